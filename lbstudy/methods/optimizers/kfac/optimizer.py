"""K-FAC: the gradient times the inverse of a Kronecker-factored Fisher matrix, then momentum as in SGD.

Martens & Grosse 2015; convolutions as in Grosse & Martens 2016; distributed after Osawa et al. 2019 and Pauloski
et al. 2020: every worker sums the factors of its own samples, sums are all-reduced, inversions are split over the
workers and their results shared, and every worker preconditions the whole gradient.

The statistics are those of single samples' losses although the loss is a mean: `capture` undoes the factor 1/N in
every gradient, without which G would be too small by N^2 and the step would turn into SGD's as N grows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbstudy.methods.optimizers.kfac import factors
from lbstudy.methods.optimizers.kfac.blocks import Block, DampingForm, KroneckerBlock, UnitwiseBlock, blocks_of
from lbstudy.methods.optimizers.kfac.exchange import PendingSum, assign, pack, share, symmetric, unpack
from lbstudy.methods.optimizers.kfac.listener import Listener, Statistic
from lbstudy.methods.optimizers.kfac.ties import settled_ties
from lbstudy.parallel.device import to_device
from lbstudy.parallel.randomness import stream
from lbstudy.parallel.workers import Workers


class KFAC(torch.optim.Optimizer):
    """Natural gradient descent with a Kronecker-factored Fisher matrix.

    d = F^-1 g;  v <- momentum v + d + weight_decay w;  w <- w - lr v. With F = I this is torch's SGD: weight decay
    is not preconditioned, so it means the same for every layer and for both optimizers. With `decay_in_gradient`
    d = F^-1 (g + weight_decay w) instead, as in Martens & Grosse 2015, whose objective has an L2 term. Then damping
    towards infinity and lr = damping times SGD's rate make this SGD with decay, with and without Nesterov's momentum;
    damping `eigen` comes near as 1 / damping, `pi` as 1 / sqrt(damping). `kl_clip` and `plain` batch norm break that.

    The hyper-parameters lie in `param_groups[0]` like the learning rate, and may be changed between steps.

    Args:
        model: its linear, convolutional and batch-norm layers get a Fisher block; other parameters, those of
            `plain_layers`, take the plain gradient.
        lr: learning rate.
        momentum: of the preconditioned gradient.
        weight_decay: see above.
        decay_in_gradient: see above; `kl_clip` then counts the decay to the gradient.
        undecayed: parameters that weight decay leaves out.
        nesterov: v is looked ahead of as in torch's SGD: w <- w - lr (d + weight_decay w + momentum v).
        damping: added to the Fisher matrix.
        past_weight: weight of the past in the running averages of the statistics; the first ones count whole. A long
            memory suits small mini-batches; at large ones an epoch has few steps, and old statistics mislead.
        factor_interval: steps from one update of the statistics to the next.
        inverse_interval: steps from one inversion to the next.
        kl_clip: largest lr^2 <d, F d> of a step, where F d = g; d is scaled down to it (Ba et al. 2017).
            None: no limit.
        fisher: `empirical`, with the labels; `monte_carlo`, with one label a sample drawn from the prediction, which
            takes a second backward pass.
        damping_form: `pi` or `eigen`, see `KroneckerBlock`.
        batch_norm: `unitwise` 2 x 2 blocks or the `plain` gradient.
        seed: of the drawn labels.
        compiled: the passes run a compiled form of the model; where statistics are collected they then do not, since
            compiled code skips the hooks.

    Raises:
        ValueError: the model has no layer that gets a block.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay_in_gradient: bool = False,
        undecayed: Collection[nn.Parameter] = (),
        nesterov: bool = False,
        damping: float = 3e-2,
        past_weight: float = 0.5,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        kl_clip: float | None = None,
        fisher: Literal["empirical", "monte_carlo"] = "empirical",
        damping_form: DampingForm = "pi",
        batch_norm: Literal["unitwise", "plain"] = "unitwise",
        seed: int = 0,
        compiled: bool = False,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping,
            "past_weight": past_weight, "factor_interval": factor_interval, "inverse_interval": inverse_interval,
            "kl_clip": kl_clip, "step": 0, "fallbacks": 0,
        }  # fmt: skip
        super().__init__(model.parameters(), defaults)
        self._model, self._fisher, self._damping_form, self._seed = model, fisher, damping_form, seed
        self._compiled, self._decay_in_gradient, self._nesterov = compiled, decay_in_gradient, nesterov
        self._undecayed = {id(parameter) for parameter in undecayed}
        self._blocks, self._plain = blocks_of(model, damping_form, batch_norm == "unitwise")
        if not self._blocks:
            raise ValueError(
                f"K-FAC has blocks for linear layers, convolutions without groups and batch norm, but "
                f"{type(model).__name__} has none of them"
            )
        self._sums: dict[Statistic, Tensor] = {}  # of this step's passes so far, over this worker's samples
        self._pending: list[tuple[list[Statistic], PendingSum]] = []

    @property
    def fallbacks(self) -> int:
        """Inversions since the beginning whose matrix was not positive definite at first, on all workers together."""
        return self.param_groups[0]["fallbacks"]

    @property
    def plain_layers(self) -> list[str]:
        """The layers that take the plain gradient for want of a block, as "features.3 (Conv2d, groups=8)".

        Complete after the first step, which shows the layers whose weight is used without calling them.
        """
        uncalled = {b.name: f"{type(b.layer).__name__}, not called" for b in self._blocks if not self._has_inverse(b)}
        plain = self._plain | (uncalled if self.param_groups[0]["step"] else {})
        return [f"{name or 'the model itself'} ({kind})" for name, kind in plain.items()]

    def _has_inverse(self, block: Block) -> bool:
        return block.inverses[0] in self.state.get(block.weight, {})

    @property
    def updates_statistics(self) -> bool:
        """Whether the coming step updates the statistics."""
        return self.param_groups[0]["step"] % self.param_groups[0]["factor_interval"] == 0

    @contextmanager
    def capture(
        self, size: int, part: slice | None = None, copy: int = 0, copies: int = 1, last: bool = True
    ) -> Iterator[None]:
        """Around one forward and backward pass: collect the statistics, on steps that update them.

        The loss inside must be sum_n l_n * workers / (size * copies) over the samples n of this pass, so that
        averages over workers of the sum of all passes are the mean loss. Hooks are on the model within the block
        and nowhere else, and its max-pooling settles ties.

        Args:
            size: samples of the global mini-batch.
            part: this pass's samples among them; default all.
            copy: which copy of the samples this is; they differ in the noise on the weights.
            copies: how many of them the step averages.
            last: of this worker's passes in the step.
        """
        if not self.updates_statistics:
            yield
            return
        workers = Workers.current()
        empirical = self._fisher == "empirical"
        total = size * copies
        samples = len(range(size)[part]) if part is not None else size
        listener = Listener(self._sums, samples, 1 / total, (total / workers.size) ** 2 if empirical else None)

        def after_forward(module: nn.Module, arguments: Any, logits: Tensor) -> None:
            if last:  # on its way while the backward pass runs
                self._begin_sum([(b, "input_factor") for b in self._blocks if isinstance(b, KroneckerBlock)], workers)
            if not empirical:
                draws = stream(self._seed, "fisher", self.param_groups[0]["step"], copy).random(size)
                draws = draws[part] if part is not None else draws
                self._backward_of_drawn_labels(logits, to_device(draws, logits.device), listener)

        hooks = [block.layer.register_forward_hook(listener.hook(block)) for block in self._blocks]
        hooks.append(self._model.register_forward_hook(after_forward))
        try:
            with (
                torch.compiler.set_stance("force_eager") if self._compiled else nullcontext(),
                settled_ties(self._model),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            listener.gradient_weight = None
        if last:
            others = [(b, s) for b in self._blocks for s in b.statistics if s != "input_factor"]
            self._begin_sum(others, workers)

    def _backward_of_drawn_labels(self, logits: Tensor, draws: Tensor, listener: Listener) -> None:
        """Collect gradients of the losses with labels from the model's own predictive distribution."""
        weights = [block.weight for block in self._blocks]
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(weights[0].dtype)
            cumulative = logits.detach().double().softmax(1).cumsum(1)
            labels = (cumulative < draws[:, None]).sum(1).clamp_(max=logits.shape[1] - 1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        listener.gradient_weight = 1.0
        torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)  # the hooks take what they need
        listener.gradient_weight = None

    def _begin_sum(self, statistics: list[Statistic], workers: Workers) -> None:
        tensors = [self._sums.pop(key) if key in self._sums else key[0].zeros(key[1]) for key in statistics]
        if workers.size > 1:
            tensors = [t.flatten() if s == "fisher" else pack(t) for (_, s), t in zip(statistics, tensors, strict=True)]
        self._pending.append((statistics, PendingSum(tensors, workers)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        Raises:
            RuntimeError: the first step's passes ran outside `capture`.
        """
        loss = closure() if closure else None
        group = self.param_groups[0]
        self._update_statistics(group)
        if group["step"] % group["inverse_interval"] == 0:
            self._update_inverses(group)
        parameters = [p for p in group["params"] if p.grad is not None]
        updates = [cast(Tensor, p.grad) for p in parameters]
        if self._decay_in_gradient:
            updates = self._decayed(updates, parameters, group)
        directions = self._directions(dict(zip(parameters, updates, strict=True)), group)
        updates = [directions.get(p, update) for p, update in zip(parameters, updates, strict=True)]
        if not self._decay_in_gradient:
            updates = self._decayed(updates, parameters, group)
        if group["momentum"]:
            for parameter in parameters:
                if "velocity" not in self.state[parameter]:
                    self.state[parameter]["velocity"] = torch.zeros_like(parameter)
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            if self._nesterov:
                updates = list(torch._foreach_add(updates, velocities, alpha=group["momentum"]))
            else:
                updates = velocities
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        group["step"] += 1
        return loss

    def _update_statistics(self, group: dict[str, Any]) -> None:
        """Take this step's statistics, summed over passes and workers, into the running averages."""
        old, new = [], []
        for statistics, pending in self._pending:
            for (block, name), total in zip(statistics, pending.wait(), strict=True):
                if total.ndim == 1:
                    zeros = block.zeros(name)
                    total = total.view_as(zeros) if name == "fisher" else symmetric(unpack(total, len(zeros)))
                state = self.state[block.weight]
                if name in state:
                    old.append(state[name])
                    new.append(total)
                elif name == "fisher" or ("input_factor" in state if name == "gradient_factor" else total.any()):
                    state[name] = total  # inputs that are all zero: no pass goes through the layer
        self._pending.clear()
        if old:
            torch._foreach_lerp_(old, new, 1 - group["past_weight"])

    def _update_inverses(self, group: dict[str, Any]) -> None:
        """Invert all statistics: the Kronecker factors each on the worker it is assigned to, the rest everywhere."""
        workers, tasks = Workers.current(), []
        known = [block for block in self._blocks if block.statistics[0] in self.state.get(block.weight, {})]
        if not known:
            raise RuntimeError("K-FAC has no statistics yet: run forward and backward passes within `capture`")
        for block in known:
            state = self.state[block.weight]
            if isinstance(block, UnitwiseBlock):
                state["inverse"] = block.inverse(state["fisher"], group["damping"])
            else:
                parts = factors.damping_parts(state["input_factor"], state["gradient_factor"], group["damping"])
                tasks += [
                    (state, name, state[statistic], part, cost)
                    for name, statistic, part, cost in zip(
                        block.inverses, block.statistics, parts, block.costs(), strict=True
                    )
                ]
        owners = assign([task[-1] for task in tasks], workers.size)
        eigen = self._damping_form == "eigen"
        mine = [
            (factor, part) for (*_, factor, part, _), owner in zip(tasks, owners, strict=True) if owner == workers.rank
        ]
        inverses, fallbacks = factors.eigenbases([f for f, _ in mine]) if eigen else factors.damped_inverses(mine)
        found = iter(inverses)
        results = [
            next(found) if owner == workers.rank else factor.new_empty(len(factor) + eigen, len(factor))
            for (*_, factor, _, _), owner in zip(tasks, owners, strict=True)
        ]
        if workers.size > 1 and results:
            fallbacks = int(workers.sum(torch.tensor(fallbacks, device=results[0].device)))
        group["fallbacks"] += fallbacks
        for (state, name, *_), inverse in zip(tasks, self._share(results, owners, workers), strict=True):
            state[name] = inverse

    def _share(self, results: list[Tensor], owners: list[int], workers: Workers) -> list[Tensor]:
        """The inverses of all workers; symmetric and triangular ones travel as triangles."""
        if workers.size == 1:
            return results
        if self._damping_form == "eigen":
            vectors = share([result.flatten() for result in results], owners, workers)
            return [vector.view_as(result) for vector, result in zip(vectors, results, strict=True)]
        packed = share([pack(result.mT) for result in results], owners, workers)
        inverses = []
        for vector, result in zip(packed, results, strict=True):
            upper = unpack(vector, len(result))
            inverses.append(upper.mT.contiguous() if len(result) > factors.LARGE else symmetric(upper))
        return inverses

    def _decayed(self, updates: list[Tensor], parameters: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        """The updates plus the weight decay."""
        decay = group["weight_decay"]
        if not decay:
            return updates
        if not self._undecayed:
            return list(torch._foreach_add(updates, [*parameters], alpha=decay))
        return [
            update if id(parameter) in self._undecayed else update.add(parameter, alpha=decay)
            for update, parameter in zip(updates, parameters, strict=True)
        ]

    def _directions(self, gradient: dict[nn.Parameter, Tensor], group: dict[str, Any]) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradient of each parameter that belongs to a block."""
        gradients, directions = [], []
        owners: list[nn.Parameter] = []
        for block in self._blocks:
            block_gradients = [gradient[p] for p in block.parameters if p in gradient]
            if len(block_gradients) == len(block.parameters) and self._has_inverse(block):
                owners += block.parameters
                gradients += block_gradients
                directions += block.precondition(block_gradients, self.state[block.weight], group["damping"])
        if group["kl_clip"] is not None and directions:
            products = torch._foreach_mul(directions, gradients)
            change = torch.stack([product.sum() for product in products]).sum().abs() * group["lr"] ** 2
            torch._foreach_mul_(directions, (group["kl_clip"] / change).sqrt().clamp(max=1))
        return dict(zip(owners, directions, strict=True))
