"""Assembly of AMD's GPUs as Mesa's RADV prints it: basic blocks, loops, and how many instructions of each kind run."""

import dataclasses
import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

KINDS = {  # the first that matches; the others work on values that a wave's threads share
    "waits": r"s_(waitcnt|wait_|nop|clause|delay_alu|sleep|inst_prefetch|set_inst_prefetch)",
    "vector": r"v_|\(invalid instruction\)",  # LLVM 19 does not know v_swap_b16
    "shared memory": r"ds_",
    "memory": r"(buffer|global|flat|tbuffer)_|s_(buffer_)?load",
    "scalar": r"s_",
}
PRODUCTS = r"v_(pk_)?(fma|fmac|mad|mac|dual_fmac)(_mix|_mixlo)?_|v_mul_f|v_dot"  # multiplications and multiply-adds


@dataclasses.dataclass
class Loop:
    """The blocks of a loop, and the loops right inside it, in the program's order."""

    head: str
    blocks: set[str]
    inner: "list[Loop]"


@dataclasses.dataclass
class Program:
    """Basic blocks, in order: their instructions, and where each may go on."""

    blocks: dict[str, list[str]]
    next: dict[str, list[str]]

    @property
    def order(self) -> list[str]:
        return list(self.blocks)


def parse(text: str) -> Program:
    """The blocks of an assembly listing; comments start with a semicolon. Raises ValueError if a branch goes nowhere."""
    blocks: dict[str, list[str]] = {"start": []}
    current = blocks["start"]
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\w+):", line):
            current = blocks[label[1]] = []
        elif repeated := re.fullmatch(r"\(then repeated (\d+) times\)", line):
            current += current[-1:] * int(repeated[1])
        elif line and line != "s_code_end":  # which fills a cache line after the last instruction
            current.append(line)
    order, following = list(blocks), {}
    for block, after in zip(order, [*order[1:], None], strict=True):
        jumps = [words[1] for words in map(str.split, blocks[block]) if re.match(r"s_c?branch", words[0])]
        if lost := set(jumps) - blocks.keys():
            raise ValueError(f"block {block} jumps to {', '.join(sorted(lost))}, which the listing lacks")
        falls = after and not (blocks[block] and re.match(r"s_(branch|endpgm|setpc)", blocks[block][-1]))
        following[block] = [*jumps, *([after] if falls else [])]
    return Program(blocks, following)


def loops(program: Program) -> list[Loop]:
    """The outermost loops, in the program's order."""
    place = {block: i for i, block in enumerate(program.order)}
    before: dict[str, list[str]] = {block: [] for block in place}
    back: dict[str, list[str]] = {}
    for block, following in program.next.items():
        for to in following:
            before[to].append(block)
            if place[to] <= place[block]:
                back.setdefault(to, []).append(block)
    found = []
    for head, tails in back.items():
        body, rest = {head}, list(tails)
        while rest:
            if (block := rest.pop()) not in body:
                body.add(block)
                rest += before[block]
        found.append(Loop(head, body, []))
    found.sort(key=lambda loop: (place[loop.head], -len(loop.blocks)))
    outermost: list[Loop] = []
    for i, loop in enumerate(found):
        around = [other for other in found[:i] if loop.blocks < other.blocks]
        (around[-1].inner if around else outermost).append(loop)
    return outermost


def kind(instruction: str) -> str:
    """One of KINDS. Raises ValueError for an instruction that is none of them."""
    for name, pattern in KINDS.items():
        if re.match(pattern, instruction):
            return name
    raise ValueError(f"what kind of instruction is {instruction!r}?")


def products(instruction: str) -> str:
    """Whether it multiplies, as a kind: "products" or "others"."""
    return "products" if re.match(PRODUCTS, instruction) else "others"


def once(program: Program, blocks: Iterable[str], what: Callable[[str], str] = kind) -> Counter:
    """The instructions of these blocks by `what`."""
    return Counter(what(instruction) for block in blocks for instruction in program.blocks[block])


def reading(program: Program) -> Loop:
    """The first loop that reads memory; of loops inside one another, the innermost that has all that reads it. Raises ValueError."""

    def reads(loop: Loop) -> int:
        return once(program, loop.blocks)["memory"]

    found, within, least = None, loops(program), 3  # both matrices' values and where they are
    while chosen := next((loop for loop in within if reads(loop) >= least), None):
        found, within, least = chosen, chosen.inner, reads(chosen)
    if not found:
        raise ValueError("no loop reads memory")
    return found


def iteration(program: Program, loop: Loop, trips: Sequence[int], what: Callable[[str], str] = kind) -> Counter:
    """The instructions of one iteration by `what`. `trips`: how often each loop inside it runs, in the program's order, outer before inner.

    A block that a branch may skip counts as run: the threads of a wave skip it only together. Raises ValueError if the number of loops
    inside differs from that of `trips`.
    """
    nested = list(_inside(loop))
    if len(nested) != len(trips):
        raise ValueError(f"the loop has {len(nested)} loops inside, {len(trips)} are expected")
    times = dict(zip((inner.head for inner in nested), trips, strict=True))
    return _counted(program, loop, times, what)


def _inside(loop: Loop) -> Iterable[Loop]:
    for inner in loop.inner:
        yield inner
        yield from _inside(inner)


def _counted(program: Program, loop: Loop, times: dict[str, int], what: Callable[[str], str]) -> Counter:
    counts = once(program, loop.blocks.difference(*(inner.blocks for inner in loop.inner)), what)
    for inner in loop.inner:
        for name, count in _counted(program, inner, times, what).items():
            counts[name] += count * times[inner.head]
    return counts


def around(program: Program, loop: Loop) -> int:
    """At least how many instructions run before and after a loop, but for waits.

    It goes the shortest way, with one iteration of each loop before it.
    """
    first = program.order[0]
    exits = {to for block in loop.blocks for to in program.next[block]} - loop.blocks
    before = _shortest(program, {first}, {loop.head})
    ends = {block for block, following in program.next.items() if not following}
    after = _shortest(program, exits, ends)
    passed = [other.blocks for other in loops(program) if other.head in before[:-1] and loop.head not in other.blocks]
    counts = once(program, {*before[:-1], *after}.union(*passed))
    return counts.total() - counts["waits"]


def _shortest(program: Program, starts: set[str], ends: set[str]) -> list[str]:
    """The blocks of the way with the fewest instructions. Raises ValueError if there is none."""
    queue = [(len(program.blocks[block]), [block]) for block in sorted(starts)]
    seen = set()
    while queue:
        cost, way = heapq.heappop(queue)
        if way[-1] in ends:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            for to in program.next[way[-1]]:
                heapq.heappush(queue, (cost + len(program.blocks[to]), [*way, to]))
    raise ValueError("no way leads through the loop")
