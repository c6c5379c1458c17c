"""What bad input gets: one clear error of our own, of the right class, that says what came and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from nets_for_tests import CASES, Net, conv, head, pooled
from secateur.errors import (
    DataError,
    ExampleInputsError,
    InputError,
    ModelError,
    NothingToPruneError,
    PlanMismatchError,
    TargetError,
    UnknownNameError,
)

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> Net:
    return Net(lambda s, x: s.head(pooled(F.relu(s.b(F.relu(s.a(x)))))), a=conv(3, 8), b=conv(8, 6), head=head(6))


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(X, torch.tensor([0, 1]))]


# -- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "words"),
    [
        (30, r"in \[0, 1\); got 30\. To remove 30 %, pass sparsity=0\.3"),
        (2.5, r"pass sparsity=0\.025"),
        (-0.1, r"in \[0, 1\); got -0\.1"),
        (1.0, "every channel removed computes nothing"),
        (1, "every channel removed computes nothing"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (True, "got True"),
        ("0.5", "got '0.5'"),
        ({"a": 30}, "pass sparsity=0.3"),
        ({"a": "0.5"}, "got '0.5'"),
        ({}, "sparsity"),
        ({"nowhere": 0.5}, "match no prunable layer"),
        ([0.5], r"got \[0\.5\]"),
        (None, "nothing to aim for"),
    ],
)
def test_sparsity_that_cannot_be_meant(sparsity: Any, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        sc.prune(model(), X, sparsity=sparsity)


@pytest.mark.parametrize("name", ["max_macs", "max_params"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "above 0; got 0"),
        (-5, "above 0; got -5"),
        (0.0, r"above 0; got 0\.0"),
        (math.nan, "above 0; got nan"),
        (True, "above 0; got True"),
        ("0.5", "above 0; got '0.5'"),
        (1.5, "a float is a fraction of the dense model"),
        (math.inf, "inf"),
        (1, "cannot be reached"),
        (1e-9, "cannot be reached|above 0"),
    ],
)
def test_budgets_that_cannot_be_meant_or_met(name: str, value: Any, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        sc.prune(model(), X, target=sc.Target(**{name: value}))


def test_targets_that_contradict_each_other() -> None:
    with pytest.raises(TargetError, match="not both"):
        sc.Target(sparsity=0.5, max_macs=0.5)
    with pytest.raises(TargetError, match="not both"):
        sc.prune(model(), X, sparsity=0.5, target=sc.Target(max_macs=0.5))
    with pytest.raises(TargetError, match=r"a secateur\.Target; got 0\.5"):
        sc.prune(model(), X, target=0.5)  # type: ignore[arg-type]  # what a user may write


# -- names and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (
            {"criterion": "taylr"},
            UnknownNameError,
            "no criterion named 'taylr'. Did you mean 'taylor'.*Known: activation_mean",
        ),
        ({"criterion": "zzz"}, UnknownNameError, "no criterion named 'zzz'. Known:"),
        ({"criterion": 5}, InputError, "criterion"),
        ({"criterion": None}, InputError, "criterion"),
        ({"scope": "layers"}, UnknownNameError, "Did you mean 'layer'"),
        ({"round_to": 0}, InputError, "round_to is a whole number of channels, at least 1; got 0"),
        ({"round_to": 1.5}, InputError, "round_to"),
        ({"keep_at_least": 0}, InputError, "keep_at_least"),
        ({"ignore": ["haed"]}, InputError, "ignore='haed' matches no module"),
        ({"ignore": "x.*"}, InputError, r"ignore='x\.\*' matches no module"),
        ({"ignore": [nn.Linear(1, 1)]}, InputError, "matches no module"),
        ({"ignore": [5]}, InputError, "ignore"),
        ({"criterion": "taylor_fo"}, InputError, "pass data="),
        ({"criterion": "taylor_fo", "data": []}, DataError, "no batch"),
        ({"data": []}, InputError, "bn|BatchNorm|no batch"),
        ({"data": 5}, InputError, "data"),
        ({"criterion": "taylor_fo", "data": 5}, InputError, "data"),
        ({"criterion": "taylor_fo", "data": [X]}, InputError, "labels"),
        ({"criterion": lambda group, evidence: None}, InputError, "score|criterion"),
        ({"ignore": ["*"]}, NothingToPruneError, "a: ignored by the caller"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    if options.get("data") == []:
        kind = DataError
    net = model()
    net.norm = nn.BatchNorm2d(3)
    with pytest.raises(kind, match=words):
        sc.prune(net, X, sparsity=0.5, **options)


def test_a_generator_that_yields_nothing() -> None:
    def nothing() -> Iterator[Any]:
        yield from ()

    with pytest.raises(DataError, match="exhausted generator"):
        sc.prune(model(), X, sparsity=0.5, criterion="taylor_fo", data=nothing())


def test_a_generator_is_used_up_by_scoring_before_the_repair() -> None:
    net = Net(lambda s, x: s.head(pooled(F.relu(s.bn(s.a(x))))), a=conv(3, 8), bn=nn.BatchNorm2d(8), head=head(8))
    with pytest.raises(DataError, match="iterated"):
        sc.prune(net, X, sparsity=0.5, criterion="taylor_fo", data=iter(labelled()))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, batch: output, r"scalar.*\[2, 3\]"),
        (lambda output, batch: 1.0, "scalar|tensor"),
        (lambda output, batch: output.sum() * math.nan, "loss is nan"),
        (lambda output, batch: torch.zeros(()), "loss"),
    ],
)
def test_losses_that_are_none(loss: Callable[..., Any], words: str) -> None:
    with pytest.raises((InputError, DataError), match=words):
        sc.prune(model(), X, sparsity=0.5, criterion="taylor_fo", data=labelled(), loss=loss)


# -- example inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(0, 3, 6, 6), r"is empty: shape \[0, 3, 6, 6\]; pass a batch of at least 1"),
        ((), "hold no tensor"),
        ((1, "x"), "hold no tensor"),
        ({}, "hold no tensor"),
        ([X], "got list"),
        (None, "got NoneType"),
        ("image.png", "got str"),
        (X.numpy(), "got ndarray"),
        (X.long(), r"forward raised RuntimeError on the example inputs \(int64 \[2, 3, 6, 6\]\)"),
        (X.double(), r"float64 \[2, 3, 6, 6\]"),
        (X[:, :2], r"float32 \[2, 2, 6, 6\].*to have 3 channels, but got 2"),
        ((X, X), r"forward raised TypeError.*float32 \[2, 3, 6, 6\], float32 \[2, 3, 6, 6\]"),
        ({"image": X}, "forward raised TypeError"),
        (X.to("meta"), r"example inputs are on meta, the model is on cpu: move them with `\.to\('cpu'\)`"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: Any, words: str) -> None:
    with pytest.raises(ExampleInputsError, match=words):
        sc.prune(model(), inputs, sparsity=0.5)


def test_the_models_own_traceback_is_kept() -> None:
    def broken(s: Any, x: Tensor) -> Tensor:
        raise KeyError("no such thing")

    with pytest.raises(ExampleInputsError, match="KeyError") as caught:
        sc.trace(Net(broken, a=conv(3, 8)), X)
    assert isinstance(caught.value.__cause__, KeyError)
    frames = []
    trace = caught.value.__cause__.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "broken" in frames


# -- models ----------------------------------------------------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Stands in for torch's class of this name, which needs a process group."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def quantised() -> nn.Module:
    from torch.ao.nn.quantized import Linear

    return nn.Sequential(nn.Linear(3, 8), Linear(8, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, about scripting
@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda: DistributedDataParallel(model()), r"a DistributedDataParallel wrapper: pass `model\.module`"),
        (lambda: nn.DataParallel(model()), r"a DataParallel wrapper: pass `model\.module`"),
        (lambda: torch.compile(model()), r"the result of torch\.compile: pass `model\._orig_mod`"),
        (lambda: torch.jit.trace(model(), X), "the model is scripted: prune the Python module first"),
        (lambda: torch.jit.script(nn.Linear(3, 8)), "the model is scripted"),
        (lambda: nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(108, 8))), "submodule '1' is scripted"),
        (lambda: torch.fx.symbolic_trace(nn.Linear(3, 8)), r"a torch\.fx graph: pass the module it was traced from"),
        (quantised, "submodule '1' is quantised"),
        (lambda: "resnet18", r"expected a torch\.nn\.Module, got str"),
        (lambda: nn.Linear, r"expected a torch\.nn\.Module, got type"),
    ],
)
def test_models_that_must_be_unwrapped(wrap: Callable[[], Any], words: str) -> None:
    wrapped = wrap()
    with pytest.raises(ModelError, match=words):
        sc.prune(wrapped, X, sparsity=0.5)
    with pytest.raises(ModelError, match=words):
        sc.trace(wrapped, X)
    with pytest.raises(ModelError, match=words):
        sc.repair(wrapped, labelled())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), "1: its size is part of the model's output"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), "no layer has channels"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Softmax(1), nn.LayerNorm(8), nn.Linear(8, 2)),
            "1: .*softmax.*4: its size is part",
        ),
    ],
)
def test_nothing_to_prune_says_why(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(NothingToPruneError, match=words):
        sc.prune(build(), X, sparsity=0.5)


def test_a_model_whose_output_holds_no_tensor() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    net = Net(lambda s, x: Answer(s.head(pooled(s.a(x)))), a=conv(3, 8), head=head(8))
    try:
        pruned = sc.prune(net, X, sparsity=0.5)
    except sc.SecateurError as error:
        assert "output" in str(error)
    else:
        assert pruned.model(X).logits.shape == (2, 3)


def test_a_lazy_layer_must_be_run_once_first() -> None:
    net = Net(lambda s, x: s.head(pooled(s.b(s.a(x)))), a=nn.LazyConv2d(8, 3), b=conv(8, 6), head=head(6))
    with pytest.raises(sc.SecateurError, match=r"[Ll]azy|uninitiali[sz]ed"):
        sc.prune(net, X, sparsity=0.5)
    net(X)
    assert sc.prune(net, X, sparsity=0.5).model.a.weight.shape[0] == 4


def test_masks_of_torchs_own_pruning_must_be_made_permanent_first() -> None:
    from torch.nn.utils import prune as torch_prune

    net = model()
    torch_prune.l1_unstructured(net.a, "weight", amount=0.5)
    net(X)
    try:
        pruned = sc.prune(net, X, sparsity=0.5)
    except sc.SecateurError as error:
        assert str(error)
    else:
        assert pruned.model(X).shape == (2, 3)
    torch_prune.remove(net.a, "weight")
    assert sc.prune(net, X, sparsity=0.5).model.a.weight.shape[0] == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", ["a", "head"])
def test_weights_that_are_no_numbers(value: float, layer: str) -> None:
    net = model()
    with torch.no_grad():
        getattr(net, layer).weight[0, 0] = value
    with pytest.raises(ModelError, match=rf"parameter '{layer}\.weight' holds NaN or infinity"):
        sc.prune(net, X, sparsity=0.5)


def test_a_model_on_the_meta_device() -> None:
    with pytest.raises(sc.SecateurError, match="meta"):
        sc.prune(model().to("meta"), X.to("meta"), sparsity=0.5)


# -- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_model_names_the_first_mismatch() -> None:
    plan = sc.prune(model(), X, sparsity=0.5).plan
    wider = Net(model().function, a=conv(3, 8), b=conv(8, 7), head=head(7))
    words = r"'b\.weight' has shape \[7, 8, 3, 3\] in the model, \[6, 8, 3, 3\] in the plan"
    for use in (sc.shrink, sc.zero_channels):
        with pytest.raises(PlanMismatchError, match=words):
            use(wider, plan)
    with pytest.raises(PlanMismatchError, match=words):
        sc.verify(wider, plan, wider, X)
    with pytest.raises(PlanMismatchError):
        plan.then(plan)


def test_a_graph_of_another_model() -> None:
    graph = sc.trace(model(), X)
    wider = Net(model().function, a=conv(3, 8), b=conv(8, 7), head=head(7))
    with pytest.raises(PlanMismatchError, match=r"b\.weight"):
        sc.observe(wider, graph)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:-10],
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"format": 1}',
        lambda text: text.replace('"format":1', '"format":99'),
        lambda text: text.replace('"dim":0', '"dim":7', 1),
        lambda text: text.replace('"size":8', '"size":9', 1),
        lambda text: text.replace('"kept":[', '"kept":[-1,', 1),
        lambda text: text.replace('"kept":[', '"kept":[0.5,', 1),
        lambda text: text.replace('"tensor":"a.weight"', '"tensor":"z.weight"', 1),
    ],
)
def test_texts_that_are_no_plan(spoil: Callable[[str], str]) -> None:
    text = sc.prune(model(), X, sparsity=0.5).plan.to_json()
    assert spoil(text) != text
    with pytest.raises(PlanMismatchError):
        sc.Plan.from_json(spoil(text))


def test_every_error_is_a_secateur_error_and_the_usual_python_one() -> None:
    assert issubclass(InputError, ValueError) and issubclass(ModelError, TypeError)
    for kind in (TargetError, UnknownNameError, ExampleInputsError):
        assert issubclass(kind, InputError) and issubclass(kind, sc.SecateurError)


def test_verify_refuses_a_model_that_answers_in_another_shape_or_does_not_run() -> None:
    case = next(case for case in CASES if case.name == "plain chain")
    net, batch = case.model(), case.batch(2)
    plan = sc.prune(net, batch, sparsity=0.5).plan
    small = sc.shrink(net, plan)
    small.head = nn.Linear(3, 2).double()
    with pytest.raises(sc.VerificationError, match=r"outputs have shapes \[\[2, 2\]\], the original's \[\[2, 3\]\]"):
        sc.verify(net, plan, small, batch)
    small.head = nn.Linear(4, 3).double()
    with pytest.raises(sc.VerificationError, match="does not run: RuntimeError"):
        sc.verify(net, plan, small, batch)
