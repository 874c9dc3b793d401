"""What kernels choose for CPUs; tests/real/test_text_at_load.py has what they did choose."""

import pytest

from elf.errors import KlpemuError
from emu.cpu_features import CPUS, FEATURES, cpu_named
from emu.mitigations import select_mitigations


def test_features_have_the_numbers_of_cpufeatures_h() -> None:
    wanted = {
        "FPU": 0,
        "NX": 1 * 32 + 20,
        "ALWAYS": 3 * 32 + 21,
        "HYPERVISOR": 4 * 32 + 31,
        "PTI": 7 * 32 + 11,
        "XENPV": 8 * 32 + 16,
        "ERMS": 9 * 32 + 9,
        "SMAP": 9 * 32 + 20,
        "RETPOLINE": 11 * 32 + 12,
        "RETHUNK": 11 * 32 + 14,
        "UNRET": 11 * 32 + 15,
        "SRSO": 11 * 32 + 24,
        "LA57": 16 * 32 + 16,
        "FSRM": 18 * 32 + 4,
        "INDIRECT_THUNK_ITS": 21 * 32 + 5,
        "BUG_CPU_MELTDOWN": 22 * 32 + 14,
        "BUG_SRSO": 23 * 32,
    }
    assert {name: FEATURES[name] for name in wanted} == wanted
    assert len(set(FEATURES.values())) == len(FEATURES)


@pytest.mark.parametrize(
    ("cpu", "options", "has", "has_not", "thunk"),
    [
        ("qemu64", "", "RETPOLINE RSB_CTXSW", "RETHUNK PTI", "__x86_return_thunk"),
        ("skylake", "", "KERNEL_IBRS PTI CLEAR_CPU_BUF USE_IBPB", "RETPOLINE RETHUNK", "__x86_return_thunk"),
        ("skylake", "spectre_v2=retpoline", "RETPOLINE USE_IBRS_FW", "KERNEL_IBRS", "__x86_return_thunk"),
        ("skylake", "mitigations=off", "", "KERNEL_IBRS PTI RETPOLINE CLEAR_CPU_BUF", "__x86_return_thunk"),
        ("skylake", "nopti", "KERNEL_IBRS", "PTI", "__x86_return_thunk"),
        (
            "sapphire-rapids",
            "",
            "CLEAR_BHB_HW RSB_VMEXIT_LITE",
            "RETPOLINE RETHUNK PTI",
            "__x86_return_thunk",
        ),
        ("tiger-lake", "", "INDIRECT_THUNK_ITS RETHUNK", "RETPOLINE", "its_return_thunk"),
        ("tiger-lake", "indirect_target_selection=vmexit", "", "RETHUNK", "__x86_return_thunk"),
        ("zen2", "", "RETPOLINE RETHUNK UNRET SRSO USE_IBPB_FW", "PTI", "srso_return_thunk"),
        ("zen2", "spec_rstack_overflow=off", "RETHUNK UNRET", "SRSO", "retbleed_return_thunk"),
        ("zen2", "retbleed=ibpb spec_rstack_overflow=off", "ENTRY_IBPB", "RETHUNK", "__x86_return_thunk"),
        ("zen2", "retbleed=off spec_rstack_overflow=off", "RETPOLINE", "RETHUNK", "__x86_return_thunk"),
        ("zen2", "spectre_v2=retpoline,lfence", "RETPOLINE_LFENCE", "", "srso_return_thunk"),
        ("zen2", "spectre_v2=ibrs", "RETPOLINE", "KERNEL_IBRS", "srso_return_thunk"),
    ],
)
def test_what_is_chosen(cpu: str, options: str, has: str, has_not: str, thunk: str) -> None:
    chosen = select_mitigations(CPUS[cpu], options)
    assert [name for name in has.split() if not chosen.cpu.has(name)] == []
    assert [name for name in has_not.split() if chosen.cpu.has(name)] == []
    assert chosen.return_thunk == thunk


def test_decisions_are_told_in_the_kernels_words() -> None:
    decisions = select_mitigations(CPUS["zen2"]).decisions
    assert decisions["spectre_v2"] == "Mitigation: Retpolines"
    assert decisions["retbleed"] == "Mitigation: untrained return thunk"
    assert decisions["srso"] == "Mitigation: Safe RET"


def test_an_unknown_cpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KlpemuError, match="no CPU '486'; choose one of: qemu64"):
        cpu_named("486")
