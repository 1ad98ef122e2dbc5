"""Which noise a tensor draws: its number, `tensor_id`, in the counter of the random generator.

The number is the tensor's position among all the optimizer's parameters, or the param group's own
`tensor_id`. If several tensors of one model would have the same position, higher bits tell them apart: from
bit 16 up the number of an optimizer that counts from 0 again; from the top bit down the rank of a process
that holds a part of the model without knowing where it lies (`parts`).
"""

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import xor
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pats_kernels import parts
from pats_kernels.plan import Batch
from pats_kernels.private import in_backward

KEY = "tensor_id"  # of a param group
BITS, POSITION_BITS = 32, 16

Claim = tuple[int, int]  # seed, number


class _Holder(NamedTuple):
    """The optimizer and the tensor that draw a claim's noise; neither is kept alive."""

    owner: "weakref.ref[Numbering]"
    param: "weakref.ref[Tensor]"


_holders: dict[Claim, _Holder] = {}  # of the whole process
_begun: Any = WeakIdKeyDictionary()  # by parameter: the claims whose noise it has drawn from t = 1 on


def ids_of(group: Mapping[str, Any], position: int) -> Sequence[int]:
    """The numbers of a param group's tensors; the first tensor is at the optimizer's position `position`.

    Raises:
        ValueError: `tensor_id` is neither a number in [0, 2^32) nor a list of one for each tensor.
    """
    own, count = group.get(KEY), len(group["params"])
    if own is None:
        return range(position, position + count)
    ids = range(own, own + count) if isinstance(own, int) else own
    numbers = isinstance(ids, (range, list, tuple)) and all(isinstance(i, int) for i in ids)
    if not numbers or len(ids) != count or not all(0 <= i < 2**BITS for i in ids):
        raise ValueError(
            f"Invalid tensor_id: {own!r} (must be the number in [0, 2^32) of the group's first parameter, "
            f"or a list of {count} such numbers, one for each parameter)"
        )
    return ids


class Numbering:
    """The numbers of an optimizer's tensors.

    A tensor is examined before its first step. After that, a step whose numbers are those of `ids_of` costs a
    lookup and two comparisons.

    Args:
        groups: how many param groups the optimizer has, to detect a step that sees fewer.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        # By parameter: the bits that its number has beyond that of `ids_of`; the `Shard` of a part whose
        # place is known.
        self._added: Any = WeakIdKeyDictionary()
        self._places: Any = WeakIdKeyDictionary()
        self._claims: Any = WeakIdKeyDictionary()
        self._special = False  # whether any number differs from that of `ids_of`, or any place is known
        # By a step's first tensor: how many tensors had a state when a step looked at its tensors. Gradient
        # release has a step for each tensor.
        self._settled: Any = WeakIdKeyDictionary()
        self.in_backward = False  # whether the last step was taken within a backward pass
        self._seen_nothing = False
        self._warned: set[str] = set()

    def numbered(
        self, batch: Batch, param_groups: Sequence[Mapping[str, Any]], fresh: Sequence[Tensor]
    ) -> Batch:
        """The batch with its final numbers, and with the places of the parts whose place is known.

        Args:
            batch: its `tensor_ids` are those of `ids_of`.
            param_groups: the optimizer's.
            fresh: the tensors whose state has just been created, so t is 1.

        Raises:
            ValueError: two of the optimizer's tensors have the same number and seed; names the second.
        """
        if not batch.params:
            if not self._seen_nothing and not any(group["params"] for group in param_groups):
                self._seen_nothing = True
                parts.streams([])  # because the other processes ask what this one holds
            return batch
        self.in_backward = in_backward()
        first = batch.params[0]
        added = list(map(self._added.get, batch.params)) if self._special else []
        # A new tensor's state may have been loaded, or may have been another's whose place it takes.
        if fresh or self._settled.get(first) != batch.kept or None in added:
            self._settle(batch, param_groups, {id(param) for param in fresh})
            self._settled[first] = batch.kept
            added = list(map(self._added.get, batch.params))
        if not self._special:
            return batch
        ids = list(map(xor, batch.tensor_ids, added))
        return replace(batch, tensor_ids=ids, shards=[self._places.get(p) for p in batch.params])

    def sees_a_part(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the optimizer is given a few of its tensors at a time; the others may come back later."""
        return len(param_groups) < self.groups or any(
            not group["params"]
            or hasattr(group["params"][0], "ds_id")  # DeepSpeed's stage 3 gives it to parts
            for group in param_groups
        )

    def _settle(self, batch: Batch, param_groups: Sequence[Mapping[str, Any]], fresh: set[int]) -> None:
        params = list(chain.from_iterable(group["params"] for group in param_groups))
        check_distinct(param_groups)
        if any(param not in self._added for param in params):
            self._compare(batch, param_groups)
        in_turn = self.sees_a_part(param_groups)
        given = {id(param) for group in param_groups if KEY in group for param in group["params"]}
        for i, param in enumerate(batch.params):
            message = SHARED
            if id(param) not in given:  # numbers that the user gave stay unchanged
                takes_turns = in_turn or hasattr(param, "ds_id")  # which DeepSpeed's stage 3 gives its parts
                message = IN_TURN if takes_turns else IN_BACKWARD if self.in_backward else SHARED
            self._claim(batch, i, param, message, begins=id(param) in fresh)

    def _compare(self, batch: Batch, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Finds out which of the optimizer's plain tensors are parts of larger ones."""
        flat = {id(p): batch.name(i) for i, p in enumerate(batch.params) if parts.is_flattened(p)}
        places = parts.flat_places(batch.params) if flat else {}
        positions = parts.zero_positions(param_groups)
        params: list[Tensor] = []
        candidates: list[Tensor | None] = []
        for group in param_groups:
            for param in group["params"]:
                position = len(params)
                params.append(param)
                known = KEY in group or id(param) in places or id(param) in positions or param.numel() == 0
                candidates.append(None if known else param)
                if id(param) in places:
                    self._places[param] = places[id(param)]
                if id(param) in positions and KEY not in group:
                    self._added.setdefault(param, position ^ positions[id(param)])
        if flat:
            self._warn("flat", parts.flattened(next(iter(flat.values())), flat.keys() <= places.keys()))
        ranks, apart = parts.streams(candidates)
        if apart:
            self._warn("apart", parts.APART)
        for param, rank in zip(params, ranks, strict=True):
            self._added.setdefault(param, int(f"{rank:0{BITS}b}"[::-1], 2))
        self._special = self._special or bool(self._places) or any(map(self._added.get, params))

    def _claim(self, batch: Batch, i: int, param: Tensor, message: str, begins: bool) -> None:
        """Registers a tensor's number. Gives it another one if a tensor of the same model has that number.

        Args:
            message: the warning if the number is taken. IN_TURN: by a tensor of this optimizer. IN_BACKWARD:
                by one of the same model, if its optimizer steps in backward too. SHARED: by one of another
                optimizer.
        """
        seed, name = batch.hyperparameters[i].seed, batch.name(i)
        claim = seed, batch.tensor_ids[i] ^ self._added[param]
        owner, other = self._holder(claim)
        if owner is not None and other is not param:
            if message is IN_BACKWARD and not owner.in_backward:
                message = SHARED
            if (owner is self) == (message is IN_TURN):
                self._warn(message, message.format(name=name, seed=seed, number=claim[1]), owner)
                claim = claim if message is SHARED else self._renumber(param, claim)
        if begins:
            begun: set[Claim] = _begun.setdefault(param, set())
            if claim in begun:
                self._warn(AGAIN, AGAIN.format(name=name, seed=seed))
            begun.add(claim)
        self._take(claim, param)

    def _holder(self, claim: Claim) -> "tuple[Numbering | None, Tensor | None]":
        """The optimizer and the tensor that draw a claim's noise, if both are alive."""
        holder = _holders.get(claim)
        owner, param = (None, None) if holder is None else (holder.owner(), holder.param())
        if owner is None or param is None or owner._claims.get(param) != claim:
            return None, None
        return owner, param

    def _take(self, claim: Claim, param: Tensor) -> None:
        _holders[claim] = _Holder(weakref.ref(self), weakref.ref(param))
        self._claims[param] = claim

    def _renumber(self, param: Tensor, claim: Claim) -> Claim:
        """Gives a tensor the next number, counted from bit 16 up, that no tensor of the same model has."""
        seed, number = claim
        for count in range(1, 2 ** (BITS - POSITION_BITS)):
            own = seed, number ^ (count << POSITION_BITS)
            owner, _ = self._holder(own)
            if owner is None or (owner is not self and not (owner.in_backward and self.in_backward)):
                self._added[param] ^= count << POSITION_BITS
                self._special = True
                self._take(own, param)
                return own
        raise ValueError(
            f"tensor_id {number} is taken by too many optimizers: give their param groups a 'tensor_id'"
        )

    def _warn(self, kind: str, message: str, owner: "Numbering | None" = None) -> None:
        """Warns once of each kind for an optimizer and for the others that share its numbers."""
        if kind not in self._warned and (owner is None or kind not in owner._warned):
            warnings.warn(f"PATS: {message}", stacklevel=2)
        self._warned.add(kind)
        if owner is not None:
            owner._warned.add(kind)


def check_distinct(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a `tensor_id` gives two of an optimizer's tensors the same number."""
    if not any(KEY in group for group in param_groups):
        return
    taken: set[tuple[Any, int]] = set()
    position = 0
    for number, group in enumerate(param_groups):
        ids = ids_of(group, position)
        position += len(ids)
        for i, tensor_id in enumerate(ids):
            if (group.get("seed"), tensor_id) in taken:
                raise ValueError(
                    f"Invalid tensor_id: param_groups[{number}]['params'][{i}] has {tensor_id}, as another "
                    "parameter with the same seed has: both would get the same noise"
                )
            taken.add((group.get("seed"), tensor_id))


SHARED = (
    "{name}: another optimizer draws its noise with seed {seed} and tensor_id {number} too, so tensors of "
    "both get the same noise. If they train one model, give one of them another seed, or set 'tensor_id' in "
    "its param groups"
)
IN_BACKWARD = (
    "{name}: another optimizer that steps within a backward pass has seed {seed} and tensor_id {number} too, "
    "because each counts its tensors from 0. Each now gets numbers of its own, in the order of their first "
    "steps, so a run is reproducible only if that order is the same. Set 'tensor_id' in each param group, or "
    "use one optimizer with release_gradients"
)
IN_TURN = (
    "{name}: the optimizer is given a few of its tensors at a time, as DeepSpeed's ZeRO does, so their "
    "positions do not tell them apart. Each gets a number of its own, in the order of their first steps"
)
AGAIN = (
    "{name}: another optimizer has already drawn this parameter's noise with seed {seed} from t = 1 on. This "
    "one draws the same noise again, so the two add up. Give each stage of training its own seed"
)
