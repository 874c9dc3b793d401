"""Variants by name."""

import pytest

from elf.errors import KlpemuError
from patches import core
from patches.variants import VARIANTS, variant, variants

ARGUMENTS = {
    "funcs_immediate": "(nap)",
    "patches_immediate": "(fix_area, fix_area2)",
    "target_state_stale": "(x)",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_name_is_a_variant_that_can_be_entered_and_left(name: str) -> None:
    with variant(name + ARGUMENTS.get(name, "")):
        pass


def test_several_hold_together() -> None:
    before = core.klp_discard_nops, core.enabled_store
    with variants(["nops_kept", "patches_registered"]):
        assert core.klp_discard_nops is not before[0]
        assert core.enabled_store is not before[1]
    assert (core.klp_discard_nops, core.enabled_store) == before


def test_several_are_left_when_one_of_them_does_not_exist() -> None:
    before = dict(vars(core))
    with pytest.raises(KlpemuError, match="no variant is called 'nobody'"), variants(["nops_kept", "nobody"]):
        pytest.fail("it was entered")
    assert dict(vars(core)) == before
