"""What is checked: arguments before training (:mod:`.arguments`), numbers during it (:mod:`.finite`)."""
