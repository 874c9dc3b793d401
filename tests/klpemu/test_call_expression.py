"""Calls of guest functions as people write them."""

import pytest

from elf.errors import KlpemuError, SymbolError
from klpemu import Kernel
from klpemu.call_expression import CallExpression, parse_argument, parse_call


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("area_of(3, 4)", CallExpression("area_of", (3, 4))),
        (" area_of ( 0x10,-1 ) ", CallExpression("area_of", (16, -1))),
        ("current_pid()", CallExpression("current_pid")),
        ("libarc4:arc4_crypt(1)", CallExpression("libarc4:arc4_crypt", (1,))),
        ("same_name,2(7)", CallExpression("same_name,2", (7,))),
        ("checked_div.cold(0)", CallExpression("checked_div.cold", (0,))),
        ("call_pointer(tail_inner, 5)", CallExpression("call_pointer", ("tail_inner", 5))),
    ],
)
def test_a_call_is_a_name_and_its_arguments(text: str, expected: CallExpression) -> None:
    assert parse_call(text) == expected
    assert parse_call(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "area_of", "area_of(", "area_of(1", "area_of(1))", "(1)", "a b(1)", "f(1)(2)"]
)
def test_what_is_no_call_is_refused(text: str) -> None:
    with pytest.raises(KlpemuError, match="is no call"):
        parse_call(text)


@pytest.mark.parametrize("text", ["f(1,)", "f(,)", "f(1 2)", "f(1.5)", "f(0xg)", "f(08x)"])
def test_what_is_no_argument_is_refused(text: str) -> None:
    with pytest.raises(KlpemuError, match="is no argument"):
        parse_call(text)


def test_an_argument_is_one_register_wide() -> None:
    assert parse_argument("0xffffffffffffffff") == 2**64 - 1
    assert parse_argument("-9223372036854775808") == -(2**63)
    for text in ("0x10000000000000000", "-9223372036854775809"):
        with pytest.raises(KlpemuError, match="does not fit 64 bits"):
            parse_argument(text)


def test_a_name_stands_for_its_address() -> None:
    kernel = Kernel.load()
    call = parse_call("call_pointer(tail_inner, 5)")
    assert call.values(kernel) == [kernel.address_of("tail_inner"), 5]
    assert kernel.call(call.function, *call.values(kernel)) == 11
    with pytest.raises(SymbolError):
        parse_call("call_pointer(nobody, 5)").values(kernel)
