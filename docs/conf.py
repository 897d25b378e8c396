"""How Sphinx builds the handbook: ``make docs``."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from sb3_ppo_from_scratch import __version__

project = "ScratchPPO"
author = "The ScratchPPO developers"
copyright = author  # noqa: A001  # Sphinx's name for it
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["build", "ppo_from_scratch.md"]  # the lecture's page is made of the notebook, which has the outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebook is committed with its outputs; a test runs it
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "ScratchPPO"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["tables.css"]


def setup(app: Sphinx) -> None:
    """Formulas are drawn by the browser itself, from MathML: Sphinx's own way loads a program from elsewhere at reading."""

    def draw(display: str) -> Any:
        def visit(writer: Any, node: nodes.Element) -> None:
            writer.body.append(convert(node.astext(), display=display))
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", draw("inline"), draw("block"))
