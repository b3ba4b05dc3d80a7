"""One response as a readable tree: the trunk, the paths of each parallel block as branches, the summary, and on.

    response
    ├─ Parallel (2 paths)
    │  ├─ Path 1: 12+34=46, 46+5=51
    │  └─ Path 2: 34+5=39, 12+39=51
    ├─ Summary: Both routes give 51.
    └─ Trunk: Final Answer: 51

Any string gives a tree. Responses are hostile input: a model can emit escape sequences, broken tags or 100,000
characters, so what is not printable is shown escaped, a tag that does not fit is shown with a mark `!` and long text
loses its middle. The parse here is for reading only; what counts as valid format is decided by the grammar of the tags.
"""

import re
import textwrap
from dataclasses import dataclass, field

MARK = "! "
_TAG = re.compile(r"<(/?)(Parallel|Path|Summary)>")
_MAX_TEXT = 600  # characters of one piece of text
_MAX_LINES = 200  # lines of the whole tree
_MAX_DEPTH = 5  # open tags inside each other; a well-formed response has 2
_MIN_WIDTH = 40


@dataclass
class _Node:
    kind: str  # "response", "Parallel", "Path", "Summary"; leaves: "Trunk", "Text" in a tag, "Tag" that fits nowhere
    text: str = ""
    faults: list[str] = field(default_factory=list)
    children: list["_Node"] = field(default_factory=list)


def render_tree(response: str, *, width: int = 100) -> str:
    """Plain-text tree of one response: no control characters but the line feed, no line longer than `width`.

    At most 200 lines, and at most 600 characters of each piece of text; what is left out is counted where it was. A
    backslash is shown as it is, so a response that spells out an escape looks like the character it names.

    Raises:
        ValueError: `width` is below 40.
    """
    if width < _MIN_WIDTH:
        raise ValueError(f"render_tree: found width={width}; give at least {_MIN_WIDTH}")
    lines = ["response" if response.strip(" \t\n") else "response (empty)"]
    _draw(_parse(response), "", width, lines)
    if len(lines) > _MAX_LINES:
        head, tail = lines[: _MAX_LINES // 2], lines[-(_MAX_LINES // 2 - 1) :]
        lines = [*head, f"[... {len(lines) - len(head) - len(tail):,} lines left out ...]", *tail]
    return "\n".join(lines)


def escape(text: str) -> str:
    """`text` with every character that is not printable, the line feed included, as its Python escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, limit: int = _MAX_TEXT) -> str:
    """`text` without its middle where it is longer than `limit`, with the number of characters left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


def _parse(response: str) -> _Node:
    """The tree of the six tags; a tag that does not fit becomes a fault of its node, or a leaf."""
    root = _Node("response")
    stack, start = [root], 0
    for tag in _TAG.finditer(response):
        _add_text(stack[-1], response[start : tag.start()])
        start = tag.end()
        closes, kind = tag[1] == "/", tag[2]
        if closes:
            _close(stack, kind, tag[0])
        else:
            _open(stack, kind, tag[0])
    _add_text(stack[-1], response[start:])
    for node in stack[1:]:
        node.faults.append("not closed")
    return root


def _open(stack: list[_Node], kind: str, tag: str) -> None:
    if kind == "Path" and stack[-1].kind == "Path":  # <Path> a <Path> b: two branches, the first not closed
        stack.pop().faults.append("not closed")
    parent = stack[-1]
    if len(stack) > _MAX_DEPTH:
        parent.children.append(_Node("Tag", tag, ["nested too deep"]))
        return
    node = _Node(kind)
    if kind == "Path" and parent.kind != "Parallel":
        node.faults.append("outside a block")
    elif kind != "Path" and parent.kind != "response":
        node.faults.append(f"inside {parent.kind}")
    parent.children.append(node)
    stack.append(node)


def _close(stack: list[_Node], kind: str, tag: str) -> None:
    if all(node.kind != kind for node in stack):
        stack[-1].children.append(_Node("Tag", tag, ["closes nothing"]))
        return
    while (node := stack.pop()).kind != kind:
        node.faults.append("not closed")


def _add_text(parent: _Node, text: str) -> None:
    text = text.strip(" \t\n")
    if text:
        faults = ["outside a path"] if parent.kind == "Parallel" else []
        kind = "Trunk" if parent.kind == "response" else "Text"
        parent.children.append(_Node(kind, text, faults))


def _draw(parent: _Node, indent: str, width: int, lines: list[str]) -> None:
    """Append the lines of the children of `parent`. Recursion ends: `_open` bounds the depth."""
    path, children = 0, _below(parent)
    for child in children:
        path += child.kind == "Path"
        last = child is children[-1]
        below = indent + ("   " if last else "│  ")
        hang = "│  " if _below(child) else "   "
        wrapped = _wrap(_label(child, path), width - len(below) - len(hang))
        lines.append(indent + ("└─ " if last else "├─ ") + wrapped[0])
        lines.extend(below + hang + line for line in wrapped[1:])
        _draw(child, below, width, lines)


def _below(node: _Node) -> list[_Node]:
    """Children that get lines of their own: text that opens a path or summary stands on the line of its parent."""
    inline = node.kind in ("Path", "Summary") and node.children and node.children[0].kind == "Text"
    return node.children[1:] if inline else node.children


def _label(node: _Node, path: int) -> str:
    """What stands on the lines of a node: mark, name, faults, text. The name leads, so text cannot pose as one."""
    faulty, name, text = bool(node.faults), node.kind, node.text
    if node.kind == "Parallel":
        paths = sum(child.kind == "Path" for child in node.children)
        faulty |= paths == 0
        name += f" ({paths} {'path' if paths == 1 else 'paths'})"
    elif node.kind in ("Path", "Summary"):
        faulty |= not node.children
        name += (f" {path}" if node.kind == "Path" else "") + ("" if node.children else " (empty)")
        text = node.children[0].text if node.children and node.children[0].kind == "Text" else ""
    head = (MARK if faulty else "") + ", ".join([name, *node.faults])
    return f"{head}: {shorten(text)}" if text else head


def _wrap(text: str, width: int) -> list[str]:
    """Escaped lines of at most `width` characters; blank lines are dropped, and there is at least one line."""
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(escape(line), width, break_on_hyphens=False)
    return lines or [""]
