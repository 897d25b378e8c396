"""Files from strangers: read without running anything that they hold."""
