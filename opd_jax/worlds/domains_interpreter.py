"""A small safe interpreter: does a Python function return what it should? Without `exec`, processes or a clock.

A program is parsed by `ast` and walked. It may define functions of positional parameters, and use in them what GRAMMAR
lists, the BUILTINS and the METHODS of lists: enough for loops, comprehensions, slices and recursion. Values are
numbers, booleans, None, and flat lists, tuples, sets and ranges of them. There are no strings, no attributes but the
methods, and functions are no values, so nothing leads out. What takes more than the limits below is refused.

Where the interpreter answers, it answers as Python does; what it refuses counts as wrong although Python might run it.
"""

import ast
import operator
import warnings
from collections.abc import Sequence
from typing import Any

STEPS = 10_000  # expressions and statements, over all calls of a program together
DEPTH = 100  # expressions within expressions, also through calls
LONGEST = 256  # items
LARGEST = 1 << 63  # whole numbers, and the largest exponent is 64
SOURCE = 2_000  # characters

BUILTINS = {
    function.__name__: function
    for function in (abs, all, any, bool, int, len, list, max, min, range, reversed, set, sorted, sum, tuple)
}
METHODS = ("append", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort")
KEYWORDS = ("default", "reverse")
BINARY = {  # the operator, and the one that changes its left side in place
    ast.Add: (operator.add, operator.iadd),
    ast.Sub: (operator.sub, operator.isub),
    ast.Mult: (operator.mul, operator.imul),
    ast.Div: (operator.truediv, operator.itruediv),
    ast.FloorDiv: (operator.floordiv, operator.ifloordiv),
    ast.Mod: (operator.mod, operator.imod),
    ast.Pow: (operator.pow, operator.ipow),
}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
GRAMMAR = {
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Load, ast.Store),
    *(ast.Return, ast.Assign, ast.AugAssign, ast.For, ast.While, ast.If, ast.Expr, ast.Pass, ast.Break, ast.Continue),
    *(ast.Constant, ast.Name, ast.List, ast.Tuple, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.Subscript, ast.Slice, ast.ListComp, ast.GeneratorExp, ast.comprehension, ast.Call, ast.keyword),
    *(ast.Attribute, ast.And, ast.Or, *BINARY, *UNARY, *COMPARE),
}
SCALARS = {int, float, bool, type(None)}
ITERATORS = {type(iter([])), type(reversed([])), type(reversed(())), type(reversed(range(0)))}
ERRORS = (  # of a program; everything else would be one of the interpreter
    ArithmeticError, LookupError, MemoryError, NameError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class Refused(ValueError):
    """The program is outside the grammar or takes more than it may."""


def passes(source: str, cases: Sequence[tuple[list, Any]], name: str = "f") -> bool:
    """Whether a function gives what is expected of every case.

    Args:
        source: the program: untrusted text.
        cases: `(x, y)`, where `name(x) == y` should hold; each call gets its own copy of the list `x`.
        name: of the function.

    Returns:
        False also where the program is no Python, raises, is refused or defines no such function.
    """
    try:
        machine = _Machine(_functions(source))
        return all(machine.call(name, [list(x)]) == y for x, y in cases)
    except ERRORS:
        return False


def _functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a program of which every node is in the grammar. Raises: one of ERRORS."""
    if len(source) > SOURCE:
        raise Refused(f"{len(source)} characters")
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # "2if" in what a model wrote
        module = ast.parse(source)
    for node in ast.walk(module):
        if type(node) not in GRAMMAR:
            raise Refused(type(node).__name__)
        if isinstance(node, ast.keyword) and node.arg not in KEYWORDS:
            raise Refused(f"the argument {node.arg}")
        if isinstance(node, ast.Call) and len(node.keywords) > 1:
            raise Refused("several named arguments")
        if isinstance(node, ast.comprehension) and node.is_async:
            raise Refused("async")
    if not all(isinstance(node, ast.FunctionDef) for node in module.body):
        raise Refused("something beside functions")
    functions = {node.name: node for node in module.body}
    for function in module.body:
        _check(function)
    return functions


def _check(function: ast.FunctionDef) -> None:
    """Refuses all but plain parameters, what only Python's compiler finds wrong, and calls of variables."""
    arguments, inside = function.args, list(ast.walk(function))
    names = [argument.arg for argument in arguments.args]
    more = [arguments.posonlyargs, arguments.kwonlyargs, arguments.defaults, arguments.vararg, arguments.kwarg]
    more += [function.decorator_list, function.returns, *(argument.annotation for argument in arguments.args)]
    if any(more) or len(set(names)) < len(names):
        raise Refused("more than different names of parameters")
    bound = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}.union(names)
    looped = {id(node) for loop in inside if isinstance(loop, ast.For | ast.While) for node in ast.walk(loop)}
    for node in inside:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in bound:
            raise Refused(f"a call of the variable {node.func.id}")
        if isinstance(node, ast.Break | ast.Continue) and id(node) not in looped:
            raise Refused("a jump outside a loop")


def _checked(value: Any) -> Any:
    """A value of a kind and size that programs may have; asked again at every use. Raises: Refused."""
    kind = type(value)
    if kind is int:
        allowed = -LARGEST <= value <= LARGEST
    elif kind in (list, tuple, set):
        allowed = len(value) <= LONGEST and all(type(item) in SCALARS for item in value)
    else:
        allowed = kind in SCALARS or kind is slice or kind in ITERATORS or (kind is range and len(value) <= LONGEST)
    if not allowed:
        raise Refused(f"a {kind.__name__}, too large or of no use")
    return value


class _Machine:
    """Walks functions. A statement gives None, or what ends its block: `break`, `continue` or `[returned]`."""

    def __init__(self, functions: dict[str, ast.FunctionDef]):
        self.functions, self.steps, self.depth = functions, 0, 0

    def call(self, name: str, values: list) -> Any:
        if name not in self.functions:
            raise NameError(name)
        function = self.functions[name]
        names = [argument.arg for argument in function.args.args]
        if len(names) != len(values):
            raise TypeError(f"{name} takes {len(names)} arguments")
        ended = self.block(function.body, dict(zip(names, values)))
        return ended[0] if isinstance(ended, list) else None

    def spend(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise Refused("too many steps")

    # -- statements

    def block(self, body: list[ast.stmt], scope: dict) -> Any:
        for node in body:
            self.spend()
            if (ended := self.statement(node, scope)) is not None:
                return ended
        return None

    def statement(self, node: ast.stmt, scope: dict) -> Any:
        match node:
            case ast.Return(value=value):
                return [None if value is None else self.value(value, scope)]
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(names) == len(values):
                results = [self.value(value, scope) for value in values]  # may be lists, which a tuple may not hold
                for name, result in zip(names, results):
                    self.assign(name, result, scope)
            case ast.Assign(targets=targets, value=value):
                result = self.value(value, scope)
                for target in targets:
                    self.assign(target, result, scope)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                before = self.lookup(name, scope)
                scope[name] = self.binary(op, before, self.value(value, scope), in_place=True)
            case ast.If(test=test, body=body, orelse=orelse):
                return self.block(body if self.value(test, scope) else orelse, scope)
            case ast.For(target=target, iter=iterable, body=body, orelse=[]):
                return self.loop(target, self.value(iterable, scope), body, scope)
            case ast.While(test=test, body=body, orelse=[]):
                while self.value(test, scope):
                    ended = self.block(body, scope)
                    if ended == "break":
                        break
                    if isinstance(ended, list):
                        return ended
            case ast.Expr(value=value):
                self.value(value, scope)
            case ast.Break():
                return "break"
            case ast.Continue():
                return "continue"
            case ast.Pass():
                pass
            case _:
                raise Refused(type(node).__name__)
        return None

    def loop(self, target: ast.expr, items: Any, body: list[ast.stmt], scope: dict) -> Any:
        for item in items:
            self.assign(target, item, scope)
            ended = self.block(body, scope)
            if ended == "break":
                break
            if isinstance(ended, list):
                return ended
        return None

    def assign(self, target: ast.expr, value: Any, scope: dict) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
            case ast.Tuple(elts=names) | ast.List(elts=names):
                values = list(value)
                if len(values) != len(names):
                    raise ValueError("as many names as values")
                for name, item in zip(names, values):
                    self.assign(name, item, scope)
            case ast.Subscript(value=owner, slice=index):
                self.value(owner, scope)[self.value(index, scope)] = value
            case _:
                raise Refused(type(target).__name__)

    # -- expressions

    def value(self, node: ast.expr, scope: dict) -> Any:
        self.spend()
        self.depth += 1  # what is raised ends the program, so it need not be counted back
        if self.depth > DEPTH:
            raise Refused("too deep")
        result = _checked(self.evaluate(node, scope))
        self.depth -= 1
        return result

    def lookup(self, name: str, scope: dict) -> Any:
        if name not in scope:
            raise NameError(name)
        return scope[name]

    def evaluate(self, node: ast.expr, scope: dict) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.lookup(name, scope)
            case ast.List(elts=items):
                return [self.value(item, scope) for item in items]
            case ast.Tuple(elts=items):
                return tuple([self.value(item, scope) for item in items])
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.value(left, scope), self.value(right, scope))
            case ast.UnaryOp(op=op, operand=operand):
                return UNARY[type(op)](self.value(operand, scope))
            case ast.BoolOp(op=op, values=values):
                for item in values:
                    result = self.value(item, scope)
                    if bool(result) == isinstance(op, ast.Or):
                        break
                return result
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                before = self.value(left, scope)
                for op, comparator in zip(ops, comparators):
                    after = self.value(comparator, scope)
                    if not COMPARE[type(op)](before, after):
                        return False
                    before = after
                return True
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test, scope) else orelse, scope)
            case ast.Subscript(value=owner, slice=index):
                return self.value(owner, scope)[self.value(index, scope)]
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if end is None else self.value(end, scope) for end in (lower, upper, step)))
            case ast.ListComp(elt=item, generators=generators):
                return list(self.comprehension(item, generators, dict(scope)))
            case ast.GeneratorExp(elt=item, generators=generators):
                return iter(list(self.comprehension(item, generators, dict(scope))))
            case ast.Call(func=function, args=arguments, keywords=keywords):
                return self.apply(function, arguments, keywords, scope)
        raise Refused(type(node).__name__)

    def binary(self, op: ast.operator, left: Any, right: Any, in_place: bool = False) -> Any:
        if isinstance(op, ast.Mult):
            for items, times in ((left, right), (right, left)):
                if isinstance(items, list | tuple) and len(items) * times > LONGEST:
                    raise Refused("a long list")
        if isinstance(op, ast.Pow) and abs(right) > 64:
            raise Refused("a large power")
        return _checked(BINARY[type(op)][in_place](left, right))

    def comprehension(self, item: ast.expr, generators: list[ast.comprehension], scope: dict) -> Any:
        first, *rest = generators
        for value in self.value(first.iter, scope):
            self.spend()
            self.assign(first.target, value, scope)
            if all(self.value(condition, scope) for condition in first.ifs):
                if rest:
                    yield from self.comprehension(item, rest, scope)
                else:
                    yield self.value(item, scope)

    def apply(self, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword], scope: dict) -> Any:
        match function:
            case ast.Name(id=name) if name in self.functions:
                if keywords:
                    raise Refused("named arguments")
                return self.call(name, [self.value(argument, scope) for argument in arguments])
            case ast.Name(id=name) if name in BUILTINS:
                called = BUILTINS[name]
            case ast.Attribute(value=value, attr=name) if name in METHODS:
                owner = self.value(value, scope)
                if type(owner) is not list:
                    raise Refused(f"{name} of a {type(owner).__name__}")
                called = getattr(owner, name)
            case _:
                raise NameError(type(function).__name__)
        values = [self.value(argument, scope) for argument in arguments]
        if called is sum and len(values) > 1 and type(values[1]) not in SCALARS:
            raise Refused("a sum of lists")
        return called(*values, **{keyword.arg: self.value(keyword.value, scope) for keyword in keywords})
