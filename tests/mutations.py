"""Hypothesis strategies that change valid files: bytes, and the values in a tree of JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**31, 2**63, 10**19, 1.5, -0.0, 1e300, "", "x", "../a", "/etc/passwd",
    "a\0b", "\ud800", "step", [], [1, 2], [[]], {}, {"a": 1}, {"x": "x"}, float("nan"),
]  # fmt: skip
ODD_TEXTS = [
    b"[" * 100_000, b'{"a":' * 500, b'{"a": 1, "a": 2}', b"9" * 5000, b"1e999", b"NaN", b"", b"[]",
    b"\xff\xfe", b"null", b'"\\ud800"', b"\0" * 8, b"\xff" * 8, b"-" * 4096,
]  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content after one to three changes: bytes flipped, cut, inserted, spliced, replaced."""
    data = content
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from([0, 1, 2, 8, 64, 1 << 20])))
        match draw(st.sampled_from(["flip", "cut", "insert", "splice", "header", "all"])):
            case "flip":
                bit = draw(st.integers(1, 255))
                data = (
                    data[:begin]
                    + bytes(b ^ bit for b in data[begin : begin + 1])
                    + data[begin + 1 :]
                )
            case "cut":
                data = data[:begin] + data[end:]
            case "insert":
                data = data[:begin] + draw(st.binary(max_size=16)) + data[begin:]
            case "splice":
                other = draw(st.integers(0, len(data)))
                data = data[:begin] + data[other : other + end - begin] + data[begin:]
            case "header":  # the length that a safetensors file begins with
                length = draw(st.sampled_from([0, 1, 8, 100, 2**31, 2**63, 2**64 - 1]))
                data = length.to_bytes(8, "little") + data[8:]
            case "all":
                data = draw(st.sampled_from(ODD_TEXTS)) + data[:begin]
    return data


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    found, level = [], [tree]
    while level:
        node = level.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                level.append(node[key])
    return found


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """The tree after one to three changes: values of other types, keys removed or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            break
        node, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["value", "value", "value", "remove", "rename", "nest"])):
            case "value":
                node[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
            case "remove":
                del node[key]
            case "rename" if isinstance(node, dict):
                node[draw(st.sampled_from(["", "x", "step", "0.fp32"]))] = node.pop(key)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 2, 100]))):
                    node[key] = [node[key]]
    return tree


def changed_json(tree: Any) -> st.SearchStrategy[bytes]:
    """The text of a JSON file with other values, or with other bytes."""
    text = json.dumps(tree).encode()
    trees = changed_tree(tree).map(lambda value: json.dumps(value).encode())
    return st.one_of(trees, trees, changed_bytes(text))
