"""What the layers below the first trained one give for a training's examples, computed once for all epochs.

Where only the last layers are trained, nothing that reaches them changes. Works for every architecture whose
layers take hidden states and give hidden states; `FrozenLayers.size` finds out by comparing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ml_assets.engine.forward import Pair, packed_pairs
from ml_assets.engine.lora import place
from ml_assets.engine.packing import WANTED, Packing, current_packing, hidden_states

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base
    from ml_assets.engine.prompt_cache import PromptCache


class FrozenLayers:
    """The layers of a model from the first one up to the first that is trained."""

    def __init__(self, layers: Sequence[torch.nn.Module]):
        *self._frozen, self._trained = layers
        self._tuples = False

    @classmethod
    def of(cls, model: torch.nn.Module, trained: Sequence[str]) -> "FrozenLayers | None":
        """Those below the modules `trained`; None where there are none, or where one of these is in no layer
        or in one of another list of layers."""
        places = [place(module) for module in trained]
        lists = {role.partition(".*")[0] for role, _ in places}
        first = min((number for _, number in places), default=-1)
        if first < 1 or len(lists) != 1:
            return None
        children = model.get_submodule(lists.pop()).named_children()
        layers = {int(number): layer for number, layer in children if number.isdigit()}
        return cls([layers[number] for number in sorted(layers) if number <= first])

    @contextlib.contextmanager
    def skipped(self) -> Iterator[None]:
        """Inside, a packing that has `entering` states begins at the trained layer."""
        layers = [*self._frozen, self._trained]
        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in self._frozen:
            layer.forward = self._passed(layer.forward)
        self._trained.forward = self._entered(self._trained.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    @torch.no_grad()
    def size(self, base: "Base", pairs: Sequence[Pair], prompts: "PromptCache | None") -> int:
        """Bytes of a token's state. 0 where a pass that begins at the trained layer does not give what a
        whole one does for the first pair: some models hand more from layer to layer than hidden states."""
        packing, _, route = packed_pairs(base, pairs[:1], prompts)
        with base.lora.routed(route):
            outputs: list[Any] = []
            hook = self._frozen[0].register_forward_hook(lambda *given: outputs.append(given[-1]))
            try:
                whole = hidden_states(base.model, packing)
            finally:
                hook.remove()
            self._tuples = isinstance(outputs[0], tuple)
            try:
                entering = self._reached(base, packing)
                # so that what a layer may remember is of other tokens
                self.states(base, [next((pair for pair in pairs if pair != pairs[0]), pairs[0])], prompts)
                packing.entering = entering
                again = hidden_states(base.model, packing)
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
                return 0
            same = torch.allclose(again, whole, rtol=1e-3, atol=1e-5)
            return entering.shape[-1] * entering.element_size() if same else 0

    @torch.no_grad()
    def states(
        self, base: "Base", pairs: Sequence[Pair], prompts: "PromptCache | None"
    ) -> list[torch.Tensor]:
        """What enters the trained layer, (tokens, size) for each pair: of its prompt and its answer without
        the last token; with `prompts`, from the invocation on."""
        packing, _, route = packed_pairs(base, pairs, prompts)
        with base.lora.routed(route):
            entering = self._reached(base, packing)[0]
        prefix, *rows = entering.split([packing.prefix, *packing.lengths])
        return [torch.cat([prefix, row]) for row in rows]

    def _reached(self, base: "Base", packing: Packing) -> torch.Tensor:
        packing.entering = WANTED
        try:
            hidden_states(base.model, packing)
        except _Reached as reached:
            return reached.hidden
        finally:
            packing.entering = None
        raise RuntimeError("the trained layer was not reached")

    def _passed(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            packing = current_packing()
            if packing is None or not isinstance(packing.entering, torch.Tensor):
                return plain(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self._tuples else hidden

        return forward

    def _entered(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            packing = current_packing()
            if packing is None or packing.entering is None:
                return plain(*args, **kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(packing.entering, torch.Tensor):
                raise _Reached(hidden)
            if args:
                return plain(packing.entering, *args[1:], **kwargs)
            return plain(**kwargs | {"hidden_states": packing.entering})

        return forward


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden
