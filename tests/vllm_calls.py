"""What a module of ours uses of vLLM, found in its source, and what of it a release does not have.

Knows the names our modules give to vLLM's objects and how stored signatures look (vllm_signatures); imports neither vLLM
nor the module.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from vllm_signatures import LISTED, signature

ENGINE_ARGS = "vllm.engine.arg_utils.EngineArgs"
# What an expression in vllm_engine holds.
HOLDS = {"self._llm": "vllm.LLM", "self._llm.llm_engine": "vllm.LLMEngine", "engine": "vllm.LLMEngine",
         "ModelRegistry": "vllm.ModelRegistry", "listed": LISTED,
         "output": "vllm.RequestOutput", "result": "vllm.CompletionOutput", "step[token]": "vllm.logprobs.Logprob"}


@dataclass(frozen=True)
class Use:
    """One use of vLLM: `kind` is import, call, key, attribute or environment.

    `guard` (argument, present): only in releases whose EngineArgs has the argument, or has not. Each of `keywords` has a
    guard of its own.
    """

    kind: str
    name: str
    line: int
    guard: tuple[str, bool] | None = None
    positional: int = 0
    keywords: tuple[tuple[str, tuple | None], ...] = ()


@dataclass
class _Finder(ast.NodeVisitor):
    uses: list[Use] = field(default_factory=list)
    imported: dict[str, str] = field(default_factory=dict)  # our name -> vLLM's dotted name
    given: dict[str, list] = field(default_factory=dict)  # name of a dict of arguments -> keywords, each with its guard
    guard: tuple[str, bool] | None = None

    def visit_Import(self, node: ast.Import) -> None:
        self.imported |= {a.asname or a.name: a.name for a in node.names if a.name.split(".")[0] == "vllm"}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and node.module.split(".")[0] == "vllm":
            self.imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            self.uses += [Use("import", f"{node.module}.{a.name}", node.lineno, self.guard) for a in node.names]

    def visit_If(self, node: ast.If) -> None:
        """`if "x" in known`: what follows is for releases whose EngineArgs has x, the `else` for the others."""
        match node.test:
            case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In()], comparators=[ast.Name(id="known")]):
                outer = self.guard
                for present, body in ((True, node.body), (False, node.orelse)):
                    self.guard = name, present
                    for child in body:
                        self.visit(child)
                self.guard = outer
            case _:
                self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="dict"))):
                self._give(name, node.value.keywords)
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key))]) if name in self.given:
                self.given[name].append((key, self.guard))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Attribute(value=ast.Name(id=name), attr="update") if name in self.given:
                self._give(name, node.keywords)
            case ast.Name(id="getattr"):
                holder, attribute = node.args[:2]
                if ast.unparse(holder) in HOLDS:
                    self.uses.append(Use("attribute", f"{HOLDS[ast.unparse(holder)]}.{attribute.value}", node.lineno, self.guard))
        if called := self._dotted(node.func):
            keywords = [(k.arg, None) for k in node.keywords if k.arg]
            for spread in (k.value.id for k in node.keywords if not k.arg):
                keywords += self.given[spread]
            self.uses.append(Use("call", called, node.lineno, self.guard, len(node.args), tuple(keywords)))
            for prompt in (a for a in node.args if isinstance(a, ast.Dict)):
                keys = tuple((k.value, None) for k in prompt.keys)
                self.uses.append(Use("key", "vllm.TokensPrompt", node.lineno, self.guard, keywords=keys))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if holder := HOLDS.get(ast.unparse(node.value)):
            self.uses.append(Use("attribute", f"{holder}.{node.attr}", node.lineno, self.guard))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch("VLLM_[A-Z0-9_]+", node.value):
            self.uses.append(Use("environment", node.value, node.lineno, self.guard))

    def _give(self, name: str, keywords: list[ast.keyword]) -> None:
        self.given.setdefault(name, []).extend((k.arg, self.guard) for k in keywords)

    def _dotted(self, func: ast.expr) -> str | None:
        """vLLM's name of what is called; None where it is not vLLM's."""
        text = ast.unparse(func)
        holder, _, attribute = text.rpartition(".")
        if holder in HOLDS:
            return f"{HOLDS[holder]}.{attribute}"
        first, dot, rest = text.partition(".")
        return self.imported[first] + dot + rest if first in self.imported else None


def uses(source: str) -> list[Use]:
    """Every use of vLLM in a module's source."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    return finder.uses


def imports_vllm(source: str) -> bool:
    """Whether a module's source imports vLLM anywhere."""
    finder = _Finder()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            finder.visit(node)
    return bool(finder.imported)


def missing(source: str, release: dict) -> list[str]:
    """What a module's source asks of vLLM that a release (as vllm_signatures stores it) does not have, with the line."""
    arguments = signature(release["calls"][ENGINE_ARGS]).parameters
    holds = lambda guard: guard is None or (guard[0] in arguments) == guard[1]
    asked = [use for use in uses(source) if holds(use.guard)]
    return sorted({f"line {use.line}: {problem}" for use in asked for problem in _problems(use, release, holds)})


def _problems(use: Use, release: dict, holds) -> list[str]:
    holder, _, last = use.name.rpartition(".")
    if use.kind == "environment":
        return [] if use.name in release["environment"].split() else [f"no environment variable {use.name}"]
    if use.kind == "import":
        return [] if use.name in release["calls"] or use.name in release["attributes"] else [f"no {use.name}"]
    if use.kind == "attribute":
        return [] if last in release["attributes"].get(holder, "").split() else [f"{holder} has no attribute {last}"]
    if use.name not in release["calls"]:
        return [f"no {use.name}"]
    names = [name for name, guard in use.keywords if holds(guard)]
    taken = signature(release["calls"][use.name])
    if use.kind == "key":
        return [f"{use.name} has no key {name}" for name in names if name not in taken.parameters]
    if use.name == "vllm.LLM":  # what it does not name it passes on to EngineArgs
        passed_on = [name for name in names if name not in taken.parameters]
        names = [name for name in names if name in taken.parameters]
        unknown = [name for name in passed_on if name not in signature(release["calls"][ENGINE_ARGS]).parameters]
        if unknown:
            return [f"{use.name} got an unexpected keyword argument '{name}'" for name in unknown]
    try:
        taken.bind(*[None] * use.positional, **dict.fromkeys(names))
    except TypeError as error:
        return [f"{use.name} {error}"]
    return []
