"""The definition of a name in a source tree, read from its syntax: parameters, defaults, number of return values.

Nothing is imported. Names are followed through `from x import y`, also within `if` and `try`, to their definition.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from .index import Tree

DEPTH = 12
"""Steps after which a name is not followed any further."""

SCHEMAS = "torchgen/packaged/ATen/native/native_functions.yaml"
"""Where torch's wheels have the schemas of its operators."""


class Parameter(NamedTuple):
    """One declared parameter."""

    name: str
    kind: str
    """`positional`, `keyword`, `args` or `kwargs`."""
    default: str | None = None
    """As code; None where there is none."""


class Function(NamedTuple):
    """The signature of a function."""

    parameters: tuple[Parameter, ...]
    returns: frozenset[int] = frozenset()
    """Lengths of the tuples that it returns, 1 for other values; empty if unknown."""

    def parameter(self, name: str) -> Parameter | None:
        return next((one for one in self.parameters if one.name == name), None)

    @property
    def positional(self) -> tuple[Parameter, ...]:
        return tuple(one for one in self.parameters if one.kind == "positional")

    def has(self, kind: str) -> bool:
        return any(one.kind == kind for one in self.parameters)


class Thing(NamedTuple):
    """A name that exists but is no function with readable parameters."""

    what: str


class Module:
    """One parsed file."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.tree = path, ast.parse(source)
        self.bound: dict[str, list[ast.stmt]] = {}
        for statement in _statements(self.tree.body):
            for name in _binds(statement):
                self.bound.setdefault(name, []).append(statement)

    @property
    def package(self) -> str:
        """The folder against which its relative imports count."""
        return self.path.rpartition("/")[0]


class Sources:
    """The modules of a tree, parsed when they are asked for."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._files = frozenset(tree.files)
        self._modules: dict[str, Module | None] = {}
        self.root = ""
        """The folder that holds the package, where a tree has it further down."""

    def find(self, name: str) -> Function | Thing | None:
        """The definition of `module:a.b`; None if there is none. `torch:x` alone may be an operator of torch."""
        module, _, inner = name.partition(":")
        self.root = self._root_of(module)
        if module == "torch" and SCHEMAS in self._files:
            schema = re.search(rf"^- func: {re.escape(inner)}\((.*)\) -> (.*)$", self.tree.read(SCHEMAS), re.MULTILINE)
            if schema:
                return from_schema(*schema.groups())
        found = self._in_module(self.root + module.replace(".", "/"), inner.split(".") if inner else [], DEPTH)
        return found

    def _root_of(self, module: str) -> str:
        """The shortest folder before a module's path."""
        top = module.replace(".", "/")
        ends = tuple(f"{top}{end}" for end in ("/__init__.py", ".py", "/__init__.pyi", ".pyi"))
        roots = [file[: -len(end)] for file in self._files for end in ends if file == end or file.endswith("/" + end)]
        return min(roots, key=len, default="")

    def module(self, path: str) -> Module | None:
        """The module of a path without its ending; None where there is none, or where it cannot be parsed."""
        if path not in self._modules:
            self._modules[path] = None
            for end in ("/__init__.py", ".py", "/__init__.pyi", ".pyi"):
                if path + end in self._files:
                    try:
                        self._modules[path] = Module(path + end, self.tree.read(path + end))
                    except SyntaxError:
                        continue
                    break
        return self._modules[path]

    def _in_module(self, path: str, names: list[str], depth: int) -> Function | Thing | None:
        module = self.module(path)
        if not names:
            return Thing("module") if module or any(file.startswith(path + "/") for file in self._files) else None
        if not depth:
            return None
        found = self._bound(module, names, depth) if module else None
        return found or self._in_module(f"{path}/{names[0]}", names[1:], depth - 1)

    def _bound(self, module: Module, names: list[str], depth: int) -> Function | Thing | None:
        statements = module.bound.get(names[0], [])
        functions = [one for one in statements if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        if functions:
            return self._function(module, functions)
        for statement in reversed(statements):
            found = self._one(module, statement, names, depth - 1)
            if found is not None:
                return found
        for star in module.bound.get("*", []):
            if isinstance(star, ast.ImportFrom):
                found = self._in_module(self._path_of(module, star), names, depth - 1)
                if found is not None:
                    return found
        return None

    def _one(self, module: Module, statement: ast.stmt, names: list[str], depth: int) -> Function | Thing | None:
        if isinstance(statement, ast.ImportFrom):
            alias = next(one for one in statement.names if (one.asname or one.name) == names[0])
            path = self._path_of(module, statement)
            found = self._in_module(path, [alias.name, *names[1:]], depth)
            known = self.module(path) or any(file.startswith(path + "/") for file in self._files)
            return found or (None if known else Thing(f"imported from {statement.module}, which is not in the package"))
        if isinstance(statement, ast.ClassDef):
            return self._in_class(module, statement, names[1:], depth)
        if isinstance(statement, ast.Import):
            return Thing("module")
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Name) and value.id != names[0]:
            return self._bound(module, [value.id, *names[1:]], depth)
        return Thing(f"a value: {ast.unparse(statement)[:80]}")

    def _in_class(self, module: Module, node: ast.ClassDef, names: list[str], depth: int) -> Function | Thing | None:
        if depth <= 0:
            return None
        inside = list(_statements(node.body))
        wanted = names[0] if names else "__init__"
        functions = [
            one for one in inside if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == wanted
        ]
        if functions:
            found = self._function(module, functions, node)
            static = any(ast.unparse(one).endswith("staticmethod") for one in functions[-1].decorator_list)
            return found if static else found._replace(parameters=found.parameters[1:])
        if any(wanted in _binds(one) for one in inside):
            return Thing("a value of the class")
        if not names and any(ast.unparse(base).endswith("NamedTuple") for base in node.bases):
            return Function(
                tuple(
                    Parameter(one.target.id, "positional", _code(one.value))
                    for one in inside
                    if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
                )
            )
        for base in node.bases:
            name = ast.unparse(base)
            found_in_base = self._bound(module, [*name.split("."), *names], depth - 1)
            if found_in_base is not None:
                return found_in_base
        return None if names else Thing("class")

    def _path_of(self, module: Module, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return self.root + (statement.module or "").replace(".", "/")
        package = module.package
        for _ in range(statement.level - 1):
            package = package.rpartition("/")[0]
        return "/".join(part for part in (package, (statement.module or "").replace(".", "/")) if part)

    def _function(
        self, module: Module, nodes: list[ast.FunctionDef | ast.AsyncFunctionDef], owner: ast.ClassDef | None = None
    ) -> Function:
        node = nodes[-1]
        overloads = [one for one in nodes if any("overload" in ast.unparse(d) for d in one.decorator_list)]
        returns = [_annotated(one) for one in overloads] or [_returned(module, node, owner, 4)]
        known = frozenset[int]().union(*returns) if all(returns) else frozenset[int]()
        return Function(parameters_of(node), known)


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[Parameter, ...]:
    """The parameters of a function in their order."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    found = [
        Parameter(one.arg, "positional", _code(default))
        for one, default in zip(positional, [*missing, *arguments.defaults], strict=True)
    ]
    found += [Parameter(arguments.vararg.arg, "args")] if arguments.vararg else []
    found += [
        Parameter(one.arg, "keyword", _code(default))
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    found += [Parameter(arguments.kwarg.arg, "kwargs")] if arguments.kwarg else []
    return tuple(found)


def from_schema(parameters: str, returned: str) -> Function:
    """A function from the schema of a torch operator."""
    found, kind = [], "positional"
    for part in filter(None, re.split(r",\s*(?![^\[(]*[\])])", parameters)):
        if part.strip() == "*":
            kind = "keyword"
            continue
        declared, _, default = part.strip().partition("=")
        found.append(Parameter(declared.split()[-1], kind, default or None))
    return Function(tuple(found), frozenset([returned.count(",") + 1]))


def _code(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those within `if`, `try` and `with`."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _binds(statement: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom):
        return [one.asname or one.name for one in statement.names]
    if isinstance(statement, ast.Import):
        return [one.asname or one.name.partition(".")[0] for one in statement.names]
    targets = (
        statement.targets
        if isinstance(statement, ast.Assign)
        else [statement.target]
        if isinstance(statement, ast.AnnAssign)
        else []
    )
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _annotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[int]:
    """Number of return values by the function's annotation; empty if it has none."""
    return frozenset(_of_annotation(node.returns)) if node.returns is not None else frozenset()


def _of_annotation(node: ast.expr) -> set[int]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _of_annotation(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return _of_annotation(node.left) | _of_annotation(node.right)
    if isinstance(node, ast.Subscript):
        name, inside = ast.unparse(node.value).rpartition(".")[2], node.slice
        parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if name in ("Tuple", "tuple"):
            return set() if any(ast.unparse(part) == "..." for part in parts) else {len(parts)}
        if name in ("Union", "Optional"):
            return set().union(*map(_of_annotation, parts))
        return set()
    text = ast.unparse(node)
    return {1} if text.rpartition(".")[2] in ("Tensor", "ModuleType", "bool", "str", "int") else set()


def _returned(
    module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.ClassDef | None, depth: int
) -> frozenset[int]:
    """Numbers of return values by the `return` statements; if one is unclear, by the annotation."""
    own = [one for one in _inside(node) if isinstance(one, ast.Return) and one.value is not None]
    found = [_of_value(module, node, one.value, owner, depth) for one in own if one.value is not None]
    return frozenset[int]().union(*found) if found and all(found) else _annotated(node)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, without the functions within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _inside(child)


def _of_value(
    module: Module,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    value: ast.expr,
    owner: ast.ClassDef | None,
    depth: int,
) -> frozenset[int]:
    if isinstance(value, ast.Tuple):
        return frozenset([len(value.elts)]) if not any(isinstance(e, ast.Starred) for e in value.elts) else frozenset()
    if isinstance(value, ast.IfExp):
        sides = [_of_value(module, node, side, owner, depth) for side in (value.body, value.orelse)]
        return frozenset[int]().union(*sides) if all(sides) else frozenset()
    if isinstance(value, ast.Subscript | ast.BinOp | ast.Constant | ast.Compare):
        return frozenset([1])
    if isinstance(value, ast.Call) and depth:
        return _of_call(module, value, owner, depth - 1)
    if isinstance(value, ast.Name) and depth:
        if any(one.name == value.id and one.kind != "args" for one in parameters_of(node)):
            return frozenset([1])
        assigned = [
            one.value
            for one in _inside(node)
            if isinstance(one, ast.Assign) and any(isinstance(t, ast.Name) and t.id == value.id for t in one.targets)
        ]
        parts = any(
            isinstance(part, ast.Name) and part.id == value.id
            for one in _inside(node)
            if isinstance(one, ast.Assign)
            for target in one.targets
            if isinstance(target, ast.Tuple)
            for part in target.elts
        )
        found = [_of_value(module, node, one, owner, depth - 1) for one in assigned]
        if all(found) and (found or parts):
            return frozenset([1] if parts else []).union(*found)
    return frozenset()


def _of_call(module: Module, call: ast.Call, owner: ast.ClassDef | None, depth: int) -> frozenset[int]:
    """Of a function of the same file, of a class's `forward` through `apply`, or of a method that gives a tensor."""
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in ("contiguous", "view", "to", "reshape", "transpose"):
        return frozenset([1])
    name, wanted = (function.id, "") if isinstance(function, ast.Name) else (ast.unparse(function), "")
    if name.endswith(".apply"):
        name, wanted = name.removesuffix(".apply"), "forward"
    for statement in module.bound.get(name, []):
        if isinstance(statement, ast.ClassDef):
            for inner in statement.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == wanted:
                    return _returned(module, inner, statement, depth)
        if isinstance(statement, ast.FunctionDef) and not wanted:
            return _returned(module, statement, owner, depth)
    return frozenset()
