"""The directive `generated`, which puts a part made by ``pages`` into a page."""

from typing import Any

import pages
from docutils import nodes
from docutils.statemachine import StringList
from pygments.lexers.special import TextLexer
from sphinx.util.docutils import SphinxDirective


class Generated(SphinxDirective):
    """``{generated} NAME ARGUMENT``: the Markdown that ``pages.PARTS[NAME]`` gives for the argument."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        name, *arguments = self.arguments
        if name not in pages.PARTS:
            raise self.error(f"generated must be one of {', '.join(pages.PARTS)}, got {name!r}")
        self.env.note_dependency(pages.__file__)
        text = pages.PARTS[name](*arguments)
        parent = nodes.Element()
        lines = StringList(text.split("\n"), source=f"{name} {' '.join(arguments)}")
        self.state.nested_parse(lines, 0, parent)
        return parent.children


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("generated", Generated)
    app.add_lexer("csv", TextLexer)
    return {"parallel_read_safe": True}
