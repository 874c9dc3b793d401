"""Which mitigations a kernel chooses for a CPU: cpu_select_mitigations() of arch/x86/kernel/cpu/bugs.c.

Only what shows in text counts here: the features that are forced on or off before alternatives are applied,
and which return thunk `x86_return_thunk` points to.  The configuration is Debian's (all of RETPOLINE,
RETHUNK, CPU_UNRET_ENTRY, CPU_IBPB_ENTRY, CPU_IBRS_ENTRY, CPU_SRSO, MITIGATION_ITS, PAGE_TABLE_ISOLATION).
"""

from dataclasses import dataclass, field, replace

from emu.cpu_features import ARCH_CAP_RFDS_CLEAR, ARCH_CAP_RRSBA, FEATURES, Cpu, Vendor

__all__ = ["Mitigations", "select_mitigations"]

RETPOLINE = "Mitigation: Retpolines"
LFENCE = "Vulnerable: LFENCE"
EIBRS = "Mitigation: Enhanced / Automatic IBRS"
EIBRS_LFENCE = "Mitigation: Enhanced / Automatic IBRS + LFENCE"
EIBRS_RETPOLINE = "Mitigation: Enhanced / Automatic IBRS + Retpolines"
IBRS = "Mitigation: IBRS"
UNRET = "Mitigation: untrained return thunk"
IBPB = "Mitigation: IBPB"
VULNERABLE = "Vulnerable"

_EIBRS_MODES = (EIBRS, EIBRS_LFENCE, EIBRS_RETPOLINE)


@dataclass(frozen=True, slots=True)
class Mitigations:
    """The CPU as alternatives see it, and what was decided.

    `cpu` has the forced features; `return_thunk` is the symbol that x86_return_thunk points to; `decisions`
    has the kernel's words by the name of the mitigation.
    """

    cpu: Cpu
    return_thunk: str
    decisions: dict[str, str]


@dataclass(eq=False, slots=True)
class _Selection:
    """boot_cpu_data and the command line while the choices are made, in the kernel's order."""

    cpu: Cpu
    options: dict[str, str]
    smt_possible: bool
    return_thunk: str = "__x86_return_thunk"
    rrsba_disabled: bool = False
    decisions: dict[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return self.cpu.has(name)

    def bug(self, name: str) -> bool:
        return self.cpu.has(f"BUG_{name}")

    def force(self, *names: str) -> None:
        """setup_force_cpu_cap()."""
        bits = sum(1 << FEATURES[name] for name in names)
        self.cpu = replace(self.cpu, capability=self.cpu.capability | bits)

    def clear(self, *names: str) -> None:
        """setup_clear_cpu_cap(), for features on which no other depends."""
        bits = sum(1 << FEATURES[name] for name in names)
        self.cpu = replace(self.cpu, capability=self.cpu.capability & ~bits)

    @property
    def off(self) -> bool:
        """cpu_mitigations_off()."""
        return self.options.get("mitigations") == "off"

    @property
    def is_amd(self) -> bool:
        return self.cpu.vendor in (Vendor.AMD, Vendor.HYGON)


def select_mitigations(cpu: Cpu, command_line: str = "", *, smt_possible: bool = True) -> Mitigations:
    """Choose as the kernel does for `cpu` booted with `command_line`.

    Understood are mitigations=off, nopti, pti=, nospectre_v1, nospectre_v2, spectre_v2=, retbleed=,
    spec_rstack_overflow= and indirect_target_selection=; other options change nothing here.
    """
    options = {}
    for word in command_line.split():
        name, _, value = word.partition("=")
        options[name] = value
    chosen = _Selection(cpu, options, smt_possible)
    for step in (
        _pti_check_boottime_disable,
        _spectre_v1,
        _spectre_v2,
        _retbleed,
        _spectre_v2_user,
        _l1tf,
        _md_clear,
        _srso,
        _its,
        _tsa,
        _vmscape,
    ):
        step(chosen)
    return Mitigations(chosen.cpu, chosen.return_thunk, chosen.decisions)


def _pti_check_boottime_disable(chosen: _Selection) -> None:
    """arch/x86/mm/pti.c; it runs before the others."""
    wanted = chosen.options.get("pti", "auto")
    if wanted == "off" or "nopti" in chosen.options or (chosen.off and wanted == "auto"):
        return
    if wanted == "on" or chosen.bug("CPU_MELTDOWN"):
        chosen.force("PTI")
        chosen.decisions["meltdown"] = "Mitigation: PTI"


def _spectre_v1(chosen: _Selection) -> None:
    if not chosen.bug("SPECTRE_V1") or chosen.off or "nospectre_v1" in chosen.options:
        return
    smap_works_speculatively = chosen.has("SMAP") and not chosen.bug("CPU_MELTDOWN")
    if chosen.has("FSGSBASE") or not smap_works_speculatively:
        if chosen.bug("SWAPGS") and not chosen.has("PTI"):
            chosen.force("FENCE_SWAPGS_USER")
        chosen.force("FENCE_SWAPGS_KERNEL")
    chosen.decisions["spectre_v1"] = "Mitigation: usercopy/swapgs barriers and __user pointer sanitization"


def _spectre_v2_mode(chosen: _Selection) -> str:
    """spectre_v2_parse_cmdline() and the mode that follows; an option that cannot be had means auto."""
    wanted = chosen.options.get("spectre_v2", "auto")
    if "nospectre_v2" in chosen.options or chosen.off or wanted == "off":
        return VULNERABLE
    intel = chosen.cpu.vendor is Vendor.INTEL
    named = {
        "retpoline": (RETPOLINE, True),
        "retpoline,generic": (RETPOLINE, True),
        "retpoline,amd": (LFENCE, chosen.has("LFENCE_RDTSC")),
        "retpoline,lfence": (LFENCE, chosen.has("LFENCE_RDTSC")),
        "eibrs": (EIBRS, chosen.has("IBRS_ENHANCED")),
        "eibrs,lfence": (EIBRS_LFENCE, chosen.has("IBRS_ENHANCED") and chosen.has("LFENCE_RDTSC")),
        "eibrs,retpoline": (EIBRS_RETPOLINE, chosen.has("IBRS_ENHANCED")),
        "ibrs": (IBRS, intel and chosen.has("IBRS")),
    }
    mode, possible = named.get(wanted, ("", False))
    if possible:
        return mode
    if not chosen.bug("SPECTRE_V2") and wanted != "on":
        return VULNERABLE
    if chosen.has("IBRS_ENHANCED"):
        return EIBRS
    if chosen.bug("RETBLEED") and chosen.options.get("retbleed") != "off" and chosen.has("IBRS") and intel:
        return IBRS
    return RETPOLINE


def _spectre_v2(chosen: _Selection) -> None:
    mode = _spectre_v2_mode(chosen)
    chosen.decisions["spectre_v2"] = mode
    if mode == VULNERABLE:
        return
    if mode == IBRS:
        chosen.force("KERNEL_IBRS")
    if mode in (LFENCE, EIBRS_LFENCE):
        chosen.force("RETPOLINE_LFENCE")
    if mode in (LFENCE, EIBRS_LFENCE, RETPOLINE, EIBRS_RETPOLINE):
        chosen.force("RETPOLINE")
    if mode in (EIBRS_LFENCE, EIBRS_RETPOLINE, RETPOLINE):
        _disable_kernel_rrsba(chosen)
    if chosen.bug("BHI"):
        _bhi(chosen)
    if mode in _EIBRS_MODES:
        if chosen.bug("EIBRS_PBRSB"):
            chosen.force("RSB_VMEXIT_LITE")
    else:
        chosen.force("RSB_CTXSW", "RSB_VMEXIT")
    if chosen.bug("RETBLEED") and chosen.has("IBPB") and chosen.is_amd:
        if chosen.options.get("retbleed") != "ibpb":
            chosen.force("USE_IBPB_FW")
    elif chosen.has("IBRS") and mode != IBRS and mode not in _EIBRS_MODES:
        chosen.force("USE_IBRS_FW")


def _disable_kernel_rrsba(chosen: _Selection) -> None:
    rrsba = chosen.cpu.arch_capabilities & ARCH_CAP_RRSBA
    chosen.rrsba_disabled = chosen.rrsba_disabled or not rrsba or chosen.has("RRSBA_CTRL")


def _bhi(chosen: _Selection) -> None:
    if chosen.options.get("spectre_bhi") == "off":
        return
    if chosen.has("RETPOLINE") and not chosen.has("RETPOLINE_LFENCE"):
        _disable_kernel_rrsba(chosen)
        if chosen.rrsba_disabled:
            return
    if chosen.has("BHI_CTRL"):
        chosen.force("CLEAR_BHB_HW")
        chosen.decisions["bhi"] = "BHI: BHI_DIS_S"
        return
    chosen.force("CLEAR_BHB_LOOP_ON_VMEXIT", "CLEAR_BHB_LOOP")
    chosen.decisions["bhi"] = "BHI: SW loop, KVM: SW loop"


def _retbleed(chosen: _Selection) -> None:
    wanted = chosen.options.get("retbleed", "auto").split(",")
    if not chosen.bug("RETBLEED") or chosen.off or "off" in wanted:
        return
    decision = VULNERABLE
    if "unret" in wanted:
        decision = UNRET
    elif "ibpb" in wanted and chosen.has("IBPB"):
        decision = IBPB
    elif chosen.is_amd:
        decision = UNRET
    if decision == UNRET:
        chosen.force("RETHUNK", "UNRET")
        chosen.return_thunk = "retbleed_return_thunk"
    elif decision == IBPB:
        chosen.force("ENTRY_IBPB", "IBPB_ON_VMEXIT")
        chosen.clear("UNRET", "RETHUNK", "RSB_VMEXIT")
    if chosen.cpu.vendor is Vendor.INTEL:
        mode = chosen.decisions["spectre_v2"]
        if mode == IBRS:
            decision = IBRS
        elif mode in _EIBRS_MODES:
            decision = "Mitigation: Enhanced IBRS"
    chosen.decisions["retbleed"] = decision


def _spectre_v2_user(chosen: _Selection) -> None:
    off = chosen.off or "nospectre_v2" in chosen.options or chosen.options.get("spectre_v2") == "off"
    if chosen.has("IBPB") and not off and chosen.options.get("spectre_v2_user") != "off":
        chosen.force("USE_IBPB")


def _l1tf(chosen: _Selection) -> None:
    # With more memory than half of what the CPU can address it is not forced; nobody emulates that much.
    if chosen.bug("L1TF"):
        chosen.force("L1TF_PTEINV")
        chosen.decisions["l1tf"] = "Mitigation: PTE Inversion"


def _md_clear(chosen: _Selection) -> None:
    """MDS, TAA, MMIO stale data and RFDS: all of them clear the buffers with one feature."""
    if chosen.off:
        return
    taa = chosen.bug("TAA") and chosen.has("RTM")
    rfds = chosen.bug("RFDS") and chosen.cpu.arch_capabilities & ARCH_CAP_RFDS_CLEAR
    if (chosen.bug("MDS") and chosen.options.get("mds") != "off") or taa or rfds:
        chosen.force("CLEAR_CPU_BUF")
        chosen.decisions["mds"] = "Mitigation: Clear CPU buffers"


def _srso(chosen: _Selection) -> None:
    if not chosen.bug("SRSO") or chosen.off:
        return
    # cpu_has_ibpb_brtype_microcode(): from Zen 3 on the microcode says so through SBPB as well.
    has_microcode = chosen.has("IBPB_BRTYPE")
    if has_microcode and chosen.cpu.family < 0x19 and not chosen.smt_possible:
        chosen.force("SRSO_NO")
        return
    if chosen.decisions.get("retbleed") == IBPB and has_microcode:
        chosen.decisions["srso"] = IBPB
        return
    wanted = chosen.options.get("spec_rstack_overflow", "safe-ret")
    if wanted in ("off", "microcode"):
        return
    if wanted == "safe-ret":
        alias = chosen.cpu.family == 0x19
        chosen.force("RETHUNK", "UNRET", "SRSO_ALIAS" if alias else "SRSO")
        chosen.return_thunk = "srso_alias_return_thunk" if alias else "srso_return_thunk"
        chosen.decisions["srso"] = "Mitigation: Safe RET"
    elif has_microcode and wanted == "ibpb":
        chosen.force("ENTRY_IBPB", "IBPB_ON_VMEXIT")
        chosen.clear("UNRET", "RETHUNK", "RSB_VMEXIT")
        chosen.decisions["srso"] = IBPB
    elif has_microcode and wanted == "ibpb-vmexit":
        chosen.force("IBPB_ON_VMEXIT")
        chosen.clear("RSB_VMEXIT")
        chosen.decisions["srso"] = "Mitigation: IBPB on VMEXIT only"


def _its(chosen: _Selection) -> None:
    wanted = chosen.options.get("indirect_target_selection", "on")
    if not chosen.bug("ITS") or chosen.off or wanted == "off":
        return
    if chosen.decisions["spectre_v2"] == VULNERABLE or chosen.has("RETPOLINE_LFENCE"):
        return
    if wanted == "vmexit" and chosen.bug("ITS_NATIVE_ONLY"):
        return
    if not chosen.has("RETPOLINE"):
        chosen.force("INDIRECT_THUNK_ITS")
    chosen.force("RETHUNK")
    chosen.return_thunk = "its_return_thunk"
    chosen.decisions["its"] = "Mitigation: Aligned branch/return thunks"


def _tsa(chosen: _Selection) -> None:
    if chosen.off or not chosen.bug("TSA") or chosen.options.get("tsa") == "off":
        return
    if chosen.has("VERW_CLEAR") or chosen.has("HYPERVISOR"):
        chosen.force("CLEAR_CPU_BUF", "CLEAR_CPU_BUF_VM")
        chosen.decisions["tsa"] = "Mitigation: Clear CPU buffers"


def _vmscape(chosen: _Selection) -> None:
    if chosen.off or not chosen.bug("VMSCAPE") or not chosen.has("IBPB"):
        return
    if chosen.decisions.get("retbleed") == IBPB or "IBPB on VMEXIT" in chosen.decisions.get("srso", ""):
        return
    chosen.force("IBPB_EXIT_TO_USER")
    chosen.decisions["vmscape"] = "Mitigation: IBPB before exit to userspace"
