"""Records for `functions` out of Python's source code: one function each, its docstring cut to its first paragraph.

    prompt          def close(self, force=False):
    continuation        \"\"\"Close the file.\"\"\"
                        if force or not self.closed:
                            self.file.close()

A prompt is the signature on one line and a continuation begins with the line's end. Every record is made of its own
function alone. Functions are left out whose signature has a comment, a backslash or more than SIGNATURE characters, and
those of which fewer than SHORTEST follow. Decorators are left out too, but for what KINDS says of them.
"""

import ast
import re
from collections.abc import Iterator

from opd_jax.worlds.records import Record

SIGNATURE, SHORTEST = 120, 40
KINDS = ("function", "method", "property", "classmethod", "staticmethod")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def records_in(source: str, module: str) -> Iterator[Record]:
    """Records of the functions and methods of a file, in its order; a function within a function is a part of it.

    Raises:
        SyntaxError: it is no Python that this version of Python reads.
    """
    lines = source.encode().split(b"\n")  # columns of a syntax tree count bytes
    for node, in_class in _functions(ast.parse(source).body, False):
        record = _record(node, in_class, lines, module)
        if record is not None:
            yield record


def _functions(body: list, in_class: bool) -> Iterator[tuple[_Function, bool]]:
    for node in body:
        if isinstance(node, _Function):
            yield node, in_class
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, True)
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            for block in ("body", "handlers", "orelse", "finalbody"):
                yield from _functions(getattr(node, block, []), in_class)


def _record(node: _Function, in_class: bool, lines: list[bytes], module: str) -> Record | None:
    signature, text = _signature(node, lines), ast.get_docstring(node, clean=False)
    statements = node.body[text is not None :]
    if signature is None or not statements:
        return None
    continuation = _docstring(text or "") + _body(statements[0], node.end_lineno, lines)
    kinds = [name.id for name in node.decorator_list if isinstance(name, ast.Name) and name.id in KINDS]
    kind = kinds[0] if kinds else "method" if in_class else "function"
    return Record(signature, continuation, module, kind) if len(continuation) >= SHORTEST else None


def _signature(node: _Function, lines: list[bytes]) -> str | None:
    """From `def` to the colon; None where more precedes the first statement, or where it is too long."""
    first = node.body[0]
    found = lines[node.lineno - 1 : _start(first)]
    found[-1] = found[-1][: first.col_offset]
    found[0] = found[0][node.col_offset :]
    text = " ".join(b" ".join(found).decode().split())
    text = text.replace("( ", "(").replace(", )", ")").replace(" )", ")")
    return text if text.endswith(":") and not set("#\\") & set(text) and len(text) <= SIGNATURE else None


def _docstring(text: str) -> str:
    """The first paragraph on a line of its own, or nothing where it would have to be escaped."""
    text = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    return "" if not text or "\\" in text or text.endswith('"') or '"""' in text else f'\n    """{text}"""'


def _body(first: ast.stmt, end: int, lines: list[bytes]) -> str:
    """The lines from a statement on, each after a line's end, indented by four and without blanks at their ends."""
    found = lines[_start(first) - 1 : end]
    found[0] = b" " * first.col_offset + found[0][first.col_offset :]  # more may precede it on its line
    text = "\n" + b"\n".join(line.rstrip() for line in found).decode()
    return re.sub(rf"\n {{0,{first.col_offset}}}(?=[^\n])", "\n    ", text)  # a line of a string may start further left


def _start(node: ast.stmt) -> int:
    """The line that a statement begins on, with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
