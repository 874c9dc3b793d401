"""Dynamic debug's control file: what it shows, what it takes, and what is printed then."""

import errno

import pytest

from emu.dynamic_debug import Callsite, DynamicDebug
from emu.errno import KernelErrno
from emu.printk import Printk

START = Callsite("kernel/livepatch/transition.c", 521, "livepatch", "klp_init", "livepatch: '%s': init\n")
END = Callsite("kernel/livepatch/transition.c", 75, "livepatch", "klp_complete", 'livepatch: done\t"%s"\n')
OTHER = Callsite("kernel/sched/core.c", 9, "core", "schedule", "core: [x]\n")


def booted() -> tuple[DynamicDebug, list[str]]:
    complaints: list[str] = []
    debug = DynamicDebug(complaints.append)
    debug.add([END, START, OTHER])
    debug.boot()
    return debug, complaints


def printing(debug: DynamicDebug) -> set[str]:
    return {site.function for site in (START, END, OTHER) if debug.prints(site)}


def test_the_file_shows_the_last_callsite_of_a_module_first() -> None:
    debug, _ = booted()
    debug.store("line 75 =pmf")
    assert debug.show() == (
        "# filename:lineno [module]function flags format\n"
        "kernel/livepatch/transition.c:521 [livepatch]klp_init =_ \"livepatch: '%s': init\\n\"\n"
        'kernel/livepatch/transition.c:75 [livepatch]klp_complete =pmf "livepatch: done\\t"%s"\\n"\n'
        'kernel/sched/core.c:9 [core]schedule =_ "core: [x]\\n"\n'
    )


@pytest.mark.parametrize(
    ("query", "printed"),
    [
        ("+p", {"klp_init", "klp_complete", "schedule"}),
        ("file kernel/livepatch/* +p", {"klp_init", "klp_complete"}),
        ("file transition.c +p", {"klp_init", "klp_complete"}),
        ("file transition.c:klp_in* +p", {"klp_init"}),
        ("file transition.c:70-80 +p", {"klp_complete"}),
        ("file sched +p", set()),
        ("func klp_?nit +p", {"klp_init"}),
        ("func klp_[i]nit +p", set()),
        ("module core +p", {"schedule"}),
        ("line 521 +p", {"klp_init"}),
        ("line 76- +p", {"klp_init"}),
        ("line -75 +p", {"klp_complete", "schedule"}),
        ("format init +p", {"klp_init"}),
        ("format ^init +p", set()),
        (r"format '^core: \133' +p", {"schedule"}),
        (r'format "done\t" =p', {"klp_complete"}),
        ("class x +p", set()),
        ("=mp", {"klp_init", "klp_complete", "schedule"}),
        ("=m", set()),
        ("+p; func klp_* -p", {"schedule"}),
        ("# all of them\n+p # really\nfunc schedule -p\n\n", {"klp_init", "klp_complete"}),
        ("+pmf\n-mf", {"klp_init", "klp_complete", "schedule"}),
        ("+p\n=_", set()),
    ],
)
def test_a_query_switches_the_callsites_it_names(query: str, printed: set[str]) -> None:
    debug, complaints = booted()
    debug.store(query)
    assert printing(debug) == printed
    assert complaints == []


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("fil x +p", 'unknown keyword "fil"'),
        ("file +p", "expecting pairs of match-spec <value>"),
        ("func a func b +p", "match-spec:func val:a overridden by b"),
        ("line 1 line 2 +p", "match-spec: line used 2x"),
        ("line 9-7 +p", "last-line:7 < 1st-line:9"),
        ("line x +p", "bad line-number: x"),
        ("func a", "bad flag-op a, at start of a"),
        ("func a +z", "unknown flag 'z'"),
        ('func "a +p', "unclosed quote: a +p"),
        ("func a file b line 1 module c format d +p", "too many words, legal max <=9"),
    ],
)
def test_a_query_that_makes_no_sense_is_einval_and_the_log_says_why(query: str, complaint: str) -> None:
    debug, complaints = booted()
    with pytest.raises(KernelErrno) as refused:
        debug.store(query)
    assert refused.value.number == errno.EINVAL
    assert complaints[0] == f"dyndbg: {complaint}"
    assert printing(debug) == set()


def test_the_queries_beside_a_wrong_one_are_carried_out() -> None:
    debug, _ = booted()
    with pytest.raises(KernelErrno):
        debug.store("func klp_init +p\nnonsense\nfunc schedule +p")
    assert printing(debug) == {"klp_init", "schedule"}


def test_more_than_a_page_is_e2big() -> None:
    debug, _ = booted()
    debug.store(" " * 4095)
    with pytest.raises(KernelErrno) as refused:
        debug.store(" " * 4096)
    assert refused.value.number == errno.E2BIG


def test_a_debug_line_is_logged_while_its_callsite_prints() -> None:
    log = Printk()
    log.dynamic_debug.add([START])
    log.pr_debug("as from the start", START)
    log.dynamic_debug.store("func klp_init -p")
    log.pr_debug("switched off", START)
    log.dynamic_debug.store("func klp_init +p")
    log.pr_debug("switched on", START)
    assert log.lines == ["as from the start", "switched on"]


def test_each_line_has_its_time_and_its_priority() -> None:
    times = iter([5, 7, 9])
    log = Printk(clock=lambda: next(times))
    log.pr_warn("a warning")
    log.vprintk_store("\x013an error\n")
    log.devkmsg_emit(12, "a program's")
    assert [(each.nanoseconds, each.priority) for each in log.stamps] == [(5, 4), (7, 3), (9, 12)]
