"""Parameter groups: what each parameter gets, and how frozen ones join later."""

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import lr_scheduler

from schuss import optim
from schuss.schedules import Schedule, cosine, linear
from schuss.training import Groups, param_groups, unfreeze


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.RMSNorm(d)
        self.attention = nn.MultiheadAttention(d, 2, add_bias_kv=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Any:
        h = self.ln_1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.gain * self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Tokens in, logits out; the head is the table of tokens again."""

    def __init__(self, d: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, d))
        self.tokens, self.positions = nn.Embedding(11, d), nn.Embedding(5, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]] + self.first
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.GroupNorm(1, channels))

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.downsample(x) + self.bn1(self.conv1(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Residual(4), Residual(4))
        self.layer2 = nn.Sequential(Residual(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)))).mean((2, 3)))


class Transfer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.backbone(x)))


def setting(groups: Groups, key: str) -> dict[str, Any]:
    """The value of a setting for each parameter, by its name."""
    return {a.names[0]: a.settings.get(key) for a in groups.assignments}


def decayed(model: nn.Module, **arguments: Any) -> set[str]:
    groups = param_groups(model, weight_decay=0.1, **arguments)
    values = setting(groups, "weight_decay")
    assert set(values.values()) <= {0.0, 0.1}
    assert [*values] == [name for name, _ in model.named_parameters()]
    return {name for name, value in values.items() if value}


def reason(groups: Groups, name: str) -> str:
    return next(a.reason for a in groups.assignments if name in a.names)


# --- which parameters decay -------------------------------------------------------------------------------------------


def test_a_transformer() -> None:
    model = Transformer(blocks=1)
    block = {"attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"}
    assert decayed(model) == {"first", *(f"blocks.0.{name}" for name in block)}
    groups = param_groups(model)
    assert reason(groups, "blocks.0.ln_2.weight") == "weight of RMSNorm"
    assert reason(groups, "blocks.0.mlp.0.bias") == "bias of Linear"
    assert reason(groups, "blocks.0.attention.bias_k") == "bias_k of MultiheadAttention"
    assert reason(groups, "blocks.0.gain") == "gain of Block, by its 1 dimension"
    assert reason(groups, "first") == "first of Transformer, by its 3 dimensions"
    assert reason(groups, "head.weight") == reason(groups, "tokens.weight") == "weight of Embedding"


def test_a_convolutional_network() -> None:
    names = {name for name, p in ResNet().named_parameters() if p.dim() > 1}
    assert decayed(ResNet()) == names
    assert len(names) == 1 + 3 * 2 + 1


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm3d(2), set()),
        (nn.InstanceNorm1d(2, affine=True), set()),
        (nn.SyncBatchNorm(2), set()),
        (nn.LayerNorm((2, 3)), set()),
        (nn.GroupNorm(1, 2), set()),
        (nn.RMSNorm((2, 3)), set()),
        (nn.EmbeddingBag(3, 2), set()),
        (nn.PReLU(2), set()),
        (nn.Bilinear(2, 2, 2), {"weight"}),
        (nn.ConvTranspose1d(2, 2, 3), {"weight"}),
        (nn.LSTM(2, 3, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (nn.ParameterList([torch.ones(2), torch.ones(2, 2), torch.ones(())]), {"1"}),
        (nn.ParameterDict({"bias": torch.ones(2, 2)}), {"bias"}),
        (type("Mine", (nn.Linear,), {})(2, 2), {"weight"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_module_decides(module: nn.Module, expected: set[str]) -> None:
    assert decayed(module) == expected


def test_a_name_decides_nothing() -> None:
    """A Linear that is called norm decays, a LayerNorm called dense does not, a matrix called bias of no layer does."""
    model = nn.ModuleDict({"norm": nn.Linear(2, 2), "dense": nn.LayerNorm((2, 2))})
    model.register_parameter("bias", nn.Parameter(torch.ones(2, 2)))
    assert decayed(model) == {"bias", "norm.weight"}


def test_parametrizations_get_what_the_tensor_would() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    linear = parametrizations.weight_norm(nn.Linear(3, 2))
    assert decayed(linear) == {"parametrizations.weight.original0", "parametrizations.weight.original1"}
    assert reason(param_groups(linear), "parametrizations.weight.original0") == "weight of ParametrizedLinear"
    norm = nn.LayerNorm((2, 2))
    parametrize.register_parametrization(norm, "weight", Scaled())
    assert decayed(nn.Sequential(norm, nn.Linear(1, 1))) == {"1.weight"}

    class Stretched(nn.Module):
        def forward(self, rows: Tensor, matrix: Tensor) -> Tensor:
            return rows[:, None] * matrix

        def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones(len(matrix)), matrix

    linear = nn.Linear(3, 2)
    parametrize.register_parametrization(linear, "weight", Stretched())
    assert decayed(linear) == {"parametrizations.weight.original0", "parametrizations.weight.original1"}
    linear = nn.Linear(3, 2)
    parametrize.register_parametrization(linear, "weight", Scaled())
    parametrize.register_parametrization(linear, "bias", Scaled())
    assert decayed(linear) == {"parametrizations.weight.original"}
    spectral = parametrizations.spectral_norm(nn.Conv2d(2, 2, 3))
    before = copy.deepcopy(dict(spectral.named_buffers()))
    assert decayed(spectral) == {"parametrizations.weight.original"}
    assert all(torch.equal(b, before[name]) for name, b in spectral.named_buffers()), "the weight was computed"


def test_weight_norm_of_old() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        linear = nn.utils.weight_norm(nn.Linear(3, 2))
    assert decayed(linear) == {"weight_g", "weight_v"}


def test_what_the_model_says_itself() -> None:
    class Said(Transformer):
        def no_weight_decay(self) -> set[str]:
            return {"first", "absent"}

    model = nn.Sequential(Said(blocks=1))
    model[0].blocks[0].mlp[0].weight._no_weight_decay = True
    block = {"attention.in_proj_weight", "attention.out_proj.weight", "mlp.2.weight"}
    assert decayed(model) == {f"0.blocks.0.{name}" for name in block}
    assert reason(param_groups(model), "0.first") == "no_weight_decay() of Said"
    assert reason(param_groups(model), "0.blocks.0.mlp.0.weight") == "marked _no_weight_decay"


def test_no_decay_of_the_user() -> None:
    model = Transfer()
    assert decayed(model) == {"backbone.0.weight", "backbone.2.weight", "head.weight"}
    assert decayed(model, no_decay="head") == {"backbone.0.weight", "backbone.2.weight"}
    assert decayed(model, no_decay=model.backbone) == {"head.weight"}
    assert decayed(model, no_decay=model.head.weight) == {"backbone.0.weight", "backbone.2.weight"}
    assert decayed(model, no_decay=[nn.Linear]) == set()
    assert decayed(model, no_decay=lambda name, p: p.shape[0] == 4) == {"head.weight"}
    assert reason(param_groups(model, no_decay="head"), "head.weight") == "no_decay 'head'"


def test_shared_parameters_appear_once_with_all_names() -> None:
    model = Transformer(blocks=1)
    groups = param_groups(model)
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    assert next(a.names for a in groups.assignments if len(a.names) > 1) == ("tokens.weight", "head.weight")
    assert "; also head.weight" in str(groups)
    layer = nn.Linear(2, 2)
    assert decayed(nn.Sequential(layer, layer)) == {"0.weight"}


# --- hidden matrices and the rest -------------------------------------------------------------------------------------


def role_of(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    return {a.names[0]: a.role for a in param_groups(model, matrices={}, **arguments).assignments}


def hidden(model: nn.Module, **arguments: Any) -> set[str]:
    """The matrices; and the groups say so, too."""
    groups = param_groups(model, matrices={}, **arguments)
    places = setting(groups, "optimizer")
    assert set(places.values()) <= {"matrices", "others"}
    found = {name for name, place in places.items() if place == "matrices"}
    assert found == {a.names[0] for a in groups.assignments if a.role == "matrix"}
    return found


def heads_of(model: nn.Module, **arguments: Any) -> set[str]:
    return {name for name, role in role_of(model, **arguments).items() if role == "head"}


def test_roles_in_a_transformer() -> None:
    """Whose head is the table of tokens again: no other weight is taken for it."""
    model = Transformer(blocks=2)
    weights = ("attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight")
    assert hidden(model) == {f"blocks.{i}.{name}" for i in range(2) for name in weights}
    roles = role_of(model)
    assert {name: roles[name] for name in ("first", "tokens.weight", "positions.weight", "norm.weight")} == {
        "first": "other", "tokens.weight": "embedding", "positions.weight": "embedding", "norm.weight": "norm",
    }  # fmt: skip
    assert roles["blocks.0.gain"] == "vector"
    assert roles["blocks.0.attention.bias_k"] == roles["blocks.0.mlp.0.bias"] == "bias"
    assert {a.role for a in param_groups(model).assignments} == {None}


def test_roles_in_a_convolutional_network() -> None:
    model = ResNet()
    kernels = {name for name, p in model.named_parameters() if p.dim() == 4}
    assert len(kernels) == 7
    assert hidden(model) == kernels
    assert heads_of(model) == {"fc.weight"}
    groups = param_groups(model, matrices={})
    assert reason(groups, "fc.weight") == "weight of Linear; head, the last layer"
    assert reason(groups, "conv1.weight") == "weight of Conv2d"


def encoder(blocks: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)


class Named(nn.Module):
    """Modules by name, in this order."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (lambda: mlp(2, 3, 3, 2), {"2.weight"}),
        (lambda: mlp(2, 3, 3, 1), {"2.weight"}),  # one row
        (lambda: nn.ModuleList(mlp(2, 3, 3)), {"1.weight"}),
        (lambda: encoder(), set()),  # a backbone alone
        (lambda: encoder(1), set()),
        (lambda: nn.Sequential(encoder(), nn.LayerNorm(4), nn.Linear(4, 2)), {"2.weight"}),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4), nn.Linear(4, 5)), {"2.weight"}),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4)), set()),
        (lambda: Named(lm_head=nn.Linear(4, 5), body=mlp(5, 4, 4)), {"lm_head.weight"}),
        (lambda: Named(score=nn.Linear(4, 5), body=mlp(5, 4, 4)), {"score.weight"}),
        (lambda: Named(body=mlp(5, 4), cls_head=nn.Linear(4, 5), box_head=nn.Linear(4, 4), more=nn.Linear(4, 4)),
         {"cls_head.weight", "box_head.weight"}),
        (lambda: Named(classifier=mlp(4, 3, 3, 2), scale=nn.LayerNorm(2)), {"classifier.2.weight"}),  # its last one
        (lambda: Named(module=Named(body=mlp(5, 4), head=nn.Linear(4, 5), more=nn.Linear(4, 4))),
         {"module.head.weight"}),
        (lambda: Named(fc=nn.Linear(4, 4), out=nn.Linear(4, 2)), {"out.weight"}),
        (lambda: Named(down=nn.Conv2d(1, 4, 3), up=nn.ConvTranspose2d(4, 1, 3)), {"up.weight"}),
        (lambda: Named(head=parametrizations.weight_norm(nn.Linear(3, 2)), more=nn.Linear(3, 3)),
         {"head.parametrizations.weight.original1"}),  # the other one is a column
        (lambda: nn.Sequential(nn.Linear(2, 3), parametrizations.spectral_norm(nn.Linear(3, 2))),
         {"1.parametrizations.weight.original"}),
    ],
)  # fmt: skip
def test_output_layers(build: Callable[[], nn.Module], heads: set[str]) -> None:
    assert heads_of(build()) == heads


def test_attention_heads_in_blocks_are_no_output_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, 4)

    blocks = nn.ModuleList([Attention(), Attention()])
    assert heads_of(Named(blocks=blocks)) == set()
    assert heads_of(Named(blocks=blocks, out=nn.Linear(4, 2))) == {"out.weight"}


def test_heads_of_the_user_overrule() -> None:
    model = Named(body=mlp(5, 4, 4), lm_head=nn.Linear(4, 5))
    assert heads_of(model) == {"lm_head.weight"}
    assert heads_of(model, heads=()) == set()
    assert heads_of(model, heads=r"body\.1") == {"body.1.weight"}
    assert heads_of(model, heads=[model.lm_head, "body.0"]) == {"lm_head.weight", "body.0.weight"}
    assert reason(param_groups(model, matrices={}, heads="body"), "body.0.weight") == "weight of Linear; heads 'body'"
    assert role_of(model, heads="lm_head")["lm_head.bias"] == "bias"


class Scale(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


@pytest.mark.parametrize(
    ("module", "roles"),
    [
        (Scale(weight=torch.ones(2, 3), bias=torch.ones(2)), {"weight": "matrix", "bias": "bias"}),  # as HF's Conv1D
        (Scale(weight=torch.ones(4, 2, 3), w1=torch.ones(2, 2)), {"weight": "other", "w1": "other"}),  # experts
        (Scale(position=torch.ones(1, 5, 4), weight=torch.ones(3)), {"position": "other", "weight": "vector"}),
        (type("RowEmbedding", (Scale,), {})(weight=torch.ones(5, 4)), {"weight": "embedding"}),
        (nn.LSTM(2, 3, bias=False), {"weight_ih_l0": "matrix", "weight_hh_l0": "matrix"}),
        (nn.Bilinear(2, 3, 4, bias=False), {"weight": "matrix"}),
        (nn.LayerNorm((2, 3)), {"weight": "norm", "bias": "norm"}),
        (nn.PReLU(3), {"weight": "vector"}),
        (nn.Linear(1, 4), {"weight": "vector", "bias": "bias"}),  # one column
        (nn.EmbeddingBag(3, 2), {"weight": "embedding"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_roles_of_a_module(module: nn.Module, roles: dict[str, str]) -> None:
    model = Named(it=module, hidden=nn.Linear(2, 2), head=nn.Linear(2, 2))
    found = role_of(model)
    assert {name: found[f"it.{name}"] for name in roles} == roles
    assert [name for name in found if name.startswith("it.")] == [f"it.{name}" for name in roles]


def test_a_shared_weight_is_an_embedding_wherever_it_comes_first() -> None:
    embedding, linear = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    linear.weight = embedding.weight
    for modules in ({"decode": linear, "encode": embedding}, {"encode": embedding, "decode": linear}):
        roles = role_of(Named(**modules, hidden=nn.Linear(4, 4)))
        assert [*roles.values()] == ["embedding", "matrix", "bias"]


def test_settings_of_matrices_are_theirs_and_the_rest_is_shared() -> None:
    model = Transfer()
    groups = param_groups(
        model, lr=1e-3, weight_decay=0.1, matrices={"lr": 0.02, "momentum": 0.9}, no_decay=r"backbone\.2"
    )
    own = {"backbone.0.weight", "backbone.2.weight"}
    assert setting(groups, "lr") == {n: 0.02 if n in own else 1e-3 for n, _ in model.named_parameters()}
    assert setting(groups, "momentum")["backbone.0.weight"] == 0.9
    assert setting(groups, "momentum")["head.weight"] is None
    decay = setting(groups, "weight_decay")
    assert (decay["backbone.0.weight"], decay["backbone.2.weight"], decay["head.weight"]) == (0.1, 0.0, 0.1)
    decay = setting(param_groups(model, weight_decay=None, matrices={"weight_decay": 0.3}), "weight_decay")
    assert (decay["backbone.0.weight"], decay["head.weight"], decay["head.bias"]) == (0.3, None, 0.0)
    layered = param_groups(model, lr=1.0, matrices={"lr": 8.0}, layer_decay=0.5)
    assert setting(layered, "lr") == {
        "backbone.0.weight": 2.0, "backbone.0.bias": 0.25, "backbone.1.weight": 0.25, "backbone.1.bias": 0.25,
        "backbone.2.weight": 4.0, "backbone.2.bias": 0.5, "head.weight": 1.0, "head.bias": 1.0,
    }  # fmt: skip
    assert all(type(group["optimizer"]) is str for group in groups)


def test_an_override_moves_a_parameter_with_the_settings_of_the_place() -> None:
    overrides = {
        r"backbone\.0\.weight": {"optimizer": "others"},
        "head.weight": {"optimizer": "matrices", "lr": 5.0},
        r"backbone\.2\.bias": {"optimizer": "third"},
    }
    groups = param_groups(Transfer(), lr=1e-3, matrices={"lr": 0.02}, overrides=overrides)
    places, rates = setting(groups, "optimizer"), setting(groups, "lr")
    assert (places["backbone.0.weight"], rates["backbone.0.weight"]) == ("others", 1e-3)
    assert (places["head.weight"], rates["head.weight"]) == ("matrices", 5.0)
    assert (places["backbone.2.bias"], rates["backbone.2.bias"]) == ("third", 1e-3)


def test_a_report_of_who_got_what() -> None:
    groups = param_groups(Transfer(), lr=1e-3, matrices={"lr": 0.02}, freeze="head")
    assert (
        str(groups)
        == """\
group 0: optimizer=matrices, lr=0.02, weight_decay=0.01; 2 tensors, 28 elements
  backbone.0.weight  4×3  weight of Linear
  backbone.2.weight  4×4  weight of Linear
group 1: optimizer=others, lr=0.001, weight_decay=0; 4 tensors, 16 elements
  backbone.0.bias    4  bias of Linear
  backbone.1.weight  4  weight of LayerNorm
  backbone.1.bias    4  bias of LayerNorm
  backbone.2.bias    4  bias of Linear
frozen: 2 tensors, 10 elements
  head.weight  2×4  weight of Linear; head, by the name head -> optimizer=others, lr=0.001, weight_decay=0.01
  head.bias    2    bias of Linear -> optimizer=others, lr=0.001, weight_decay=0"""
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(heads="head"), ValueError, "heads is for matrices, which is None"),
        (dict(matrices={"lr": -1}), ValueError, r"matrices: lr must be in \[0, inf\), got -1"),
        (dict(matrices={"weight_deca": 1}), ValueError, "matrices: unknown setting 'weight_deca'; did you mean"),
        (dict(matrices={"optimizer": "x"}), ValueError, "matrices: optimizer is no setting"),
        (dict(matrices={}, heads="nothing"), ValueError, "heads: 'nothing' means no parameter"),
        (dict(matrices={}, heads=["backbone", "head"]), ValueError,
         r"Transfer has no hidden matrix; backbone\.0\.weight, .* seems to be of its output layer"),
        (dict(matrices={"lr"}), TypeError, "matrices must be settings by name, such as {'lr': 0.01}, got set"),
        (dict(matrices={"net": {"lr": 1}}), TypeError, "net must be the value of a setting, a number say, got dict"),
        (dict(overrides={"head": 0.1}), TypeError, "overrides 'head' must be settings by name, .* got float"),
        (dict(overrides={"head": {"optimizer": 1}}), TypeError, "optimizer must be a name, as a string, got 1"),
        (dict(matrices={}, overrides={"bias": {"optimizer": "matrices"}}), ValueError,
         r"matrices: its parameters must be matrices.*4 of 6 are not: backbone\.0\.bias \(4,\)"),
    ],
    ids=str,
)  # fmt: skip
def test_matrices_that_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Transfer()
    with pytest.raises(error, match=message):
        param_groups(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


# --- what a match means, overrides ------------------------------------------------------------------------------------


def test_a_regular_expression_matches_whole_parts_of_names() -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(1, 1), "overhead": nn.Linear(1, 1), "heads": nn.ModuleList([nn.Linear(1, 1)])}
    )

    def names(pattern: str) -> set[str]:
        values = setting(param_groups(model, overrides={pattern: {"lr": 2.0}}), "lr")
        return {name for name, value in values.items() if value == 2.0}

    assert names("head") == {"head.weight", "head.bias"}
    assert names("head.*") == {"head.weight", "head.bias", "heads.0.weight", "heads.0.bias"}
    assert names("weight") == {"head.weight", "overhead.weight", "heads.0.weight"}
    assert names(r"heads\.\d+") == {"heads.0.weight", "heads.0.bias"}
    assert names("head|heads") == names("head.*")


def test_of_two_overrides_the_later_wins_key_by_key() -> None:
    model = Transfer()
    groups = param_groups(
        model,
        lr=1e-3,
        overrides=[
            (model.backbone, {"lr": 1e-5, "betas": (0.9, 0.99)}),
            (nn.LayerNorm, {"weight_decay": 0.5}),
            ("bias", {"lr": 1e-4}),
        ],
    )
    table = {a.names[0]: dict(a.settings) for a in groups.assignments}
    assert table == {
        "backbone.0.weight": {"lr": 1e-5, "weight_decay": 0.01, "betas": (0.9, 0.99)},
        "backbone.0.bias": {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        "backbone.1.weight": {"lr": 1e-5, "weight_decay": 0.5, "betas": (0.9, 0.99)},
        "backbone.1.bias": {"lr": 1e-4, "weight_decay": 0.5, "betas": (0.9, 0.99)},
        "backbone.2.weight": {"lr": 1e-5, "weight_decay": 0.01, "betas": (0.9, 0.99)},
        "backbone.2.bias": {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        "head.weight": {"lr": 1e-3, "weight_decay": 0.01},
        "head.bias": {"lr": 1e-4, "weight_decay": 0.0},
    }
    assert reason(groups, "backbone.1.bias") == (
        "bias of LayerNorm; overrides this Sequential; overrides LayerNorm; overrides 'bias'"
    )
    assert [len(group["params"]) for group in groups] == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"param_groups: lr must be None or in \[0, inf\), got -1.0"),
        ({"weight_decay": -1.0}, r"param_groups: weight_decay must be None or in \[0, inf\), got -1.0"),
        ({"lr": 1.0, "layer_decay": 1.5}, r"param_groups: layer_decay must be None or in \(0, 1\], got 1.5"),
        ({"layer_decay": 0.5}, "param_groups: layer_decay needs lr, the learning rate of the last layer"),
        ({"layers": []}, "param_groups: layers is for layer_decay, which is None"),
        ({"freeze": "hed"}, "param_groups: freeze: 'hed' means no parameter; near it: head"),
        (
            {"freeze": "back"},
            r"freeze: 'back' means no parameter; it must match whole parts of a name; near it: backbone.0.weight, ",
        ),
        ({"no_decay": ["zzz"]}, "param_groups: no_decay: 'zzz' means no parameter; near it: backbone, head$"),
        ({"no_decay": nn.Conv2d}, "param_groups: no_decay: Conv2d means no parameter$"),
        ({"freeze": nn.Linear(1, 1)}, "param_groups: freeze: this Linear means no parameter$"),
        ({"freeze": "head("}, r"param_groups: freeze: 'head\(' is not a regular expression: .* at position 4"),
        ({"overrides": {"head": {"lr": -1}}}, r"overrides 'head': lr must be in \[0, inf\), got -1"),
        ({"overrides": {"head": {"params": []}}}, "overrides 'head': params is no setting"),
        (
            {"overrides": {"head": {"weigth_decay": 0}}},
            "overrides 'head': unknown setting 'weigth_decay'; did you mean 'weight_decay'?",
        ),
        ({"freeze": ["backbone", "head"]}, "param_groups: Transfer has no parameter that is not frozen"),
        ({"lr": 1.0, "layer_decay": 0.5, "layers": [nn.Linear(1, 1)]}, r"layers\[0\] has no parameter of the model"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = Transfer()
    with pytest.raises(ValueError, match=message):
        param_groups(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


def test_more_that_is_refused() -> None:
    with pytest.raises(TypeError, match=r"param_groups: freeze: what is meant must be a regular expression, .* got 3"):
        param_groups(Transfer(), freeze=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"layers\('backbone.0.weight'\) must be an integer in \[0, inf\), got -1"):
        param_groups(Transfer(), lr=1.0, layer_decay=0.5, layers=lambda name: -1)
    with pytest.raises(ValueError, match="param_groups: ReLU has no parameters"):
        param_groups(nn.ReLU())
    with pytest.raises(ValueError, match=r"param_groups: 0\.weight has no shape yet; call the model once before"):
        param_groups(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(ValueError, match="FullyShardedDataParallel flattens parameters; use fully_shard"):
        param_groups(type("FullyShardedDataParallel", (Transfer,), {})())


# --- layer-wise learning rates ----------------------------------------------------------------------------------------


def test_layer_decay_by_blocks() -> None:
    """BEiT's numbers: embeddings at depth 0, block i at i + 1, the rest at n + 1; lr * decay^(n + 1 - depth)."""
    model = Transformer(blocks=3)
    groups = param_groups(model, lr=2.0, layer_decay=0.5, layers=model.blocks)
    for name, lr in setting(groups, "lr").items():
        depth = {"first": 0, "tokens": 0, "positions": 0, "norm": 4}.get(name.split(".")[0])
        depth = int(name.split(".")[1]) + 1 if depth is None else depth
        assert lr == 2.0 * 0.5 ** (4 - depth), name
    assert reason(groups, "norm.weight") == "weight of LayerNorm; depth 4 of 4"
    assert len(groups) == 2 * 3 + 2 + 1, "depth 0 has a matrix of no module, too; the end has a norm only"


def test_layer_decay_by_order() -> None:
    by_name = {
        "conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer1.0.downsample.0.weight": 1,
        "layer1.1.bn1.weight": 2, "layer2.0.conv1.weight": 3, "fc.weight": 4, "fc.bias": 4,
    }  # fmt: skip
    rates = setting(param_groups(ResNet(), lr=1.0, layer_decay=0.5), "lr")
    assert {name: rates[name] for name in by_name} == {name: 0.5 ** (4 - depth) for name, depth in by_name.items()}

    model = nn.ModuleDict({"backbone": Transformer(blocks=2), "head": nn.Linear(8, 2)})
    rates = setting(param_groups(model, lr=1.0, layer_decay=0.5), "lr")
    assert [rates[f"backbone.{n}"] for n in ("first", "tokens.weight", "positions.weight")] == [0.5**3] * 3
    assert rates["backbone.blocks.0.gain"] == 0.5**2
    assert rates["backbone.blocks.1.mlp.2.weight"] == rates["backbone.norm.weight"] == 0.5
    assert rates["head.weight"] == 1.0

    layers = nn.Sequential(
        nn.Linear(1, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    )
    assert [*setting(param_groups(layers, lr=1.0, layer_decay=0.5), "lr").values()] == [
        0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0,
    ]  # fmt: skip
    assert set(setting(param_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5), "lr").values()) == {1.0}


def test_layer_decay_by_function_and_with_overrides_and_frozen_layers() -> None:
    groups = param_groups(
        Transfer(), lr=1.0, layer_decay=0.5, layers=lambda name: 7 * name.startswith("head"),
        overrides={"backbone.2": {"lr": 3.0}}, freeze="head",
    )  # fmt: skip
    rates = setting(groups, "lr")
    assert rates["backbone.0.weight"] == 0.5**7
    assert rates["backbone.2.weight"] == 3.0
    assert rates["head.weight"] == 1.0
    assert groups.frozen == ("head.weight", "head.bias")


# --- the groups as optimizers take them -------------------------------------------------------------------------------


def test_equal_settings_are_one_group_in_the_order_of_the_model() -> None:
    model = Transformer(blocks=24)
    groups = param_groups(model)
    assert len(groups) == 2
    names = [name for name, _ in model.named_parameters()]
    for group in groups:
        mine = [name for name, _ in group["params"]]
        assert mine == [name for name in names if name in mine]
    again = param_groups(copy.deepcopy(model))
    assert [[n for n, _ in g["params"]] for g in again] == [[n for n, _ in g["params"]] for g in groups]
    assert [g.keys() for g in groups] == [{"params", "weight_decay"}] * 2


@pytest.mark.parametrize("cls", [torch.optim.AdamW, optim.AdamW, torch.optim.SGD, optim.SGD, optim.Lion])
def test_any_optimizer_takes_them_several_times(cls: Any) -> None:
    groups = param_groups(Transfer(), lr=0.1, overrides={"head": {"lr": 0.2}})
    shown = str(groups)
    first, second = cls(groups, lr=1.0), cls(groups, lr=1.0)
    first.param_groups[0]["lr"] = 5.0
    assert [g["lr"] for g in second.param_groups] == [0.1, 0.1, 0.2, 0.2]
    assert [g["weight_decay"] for g in second.param_groups] == [0.01, 0.0, 0.01, 0.0]
    assert second.param_groups[3]["param_names"] == ["head.bias"]
    assert str(groups) == shown
    more = cls([*groups[:2], {"params": groups[2]["params"], "lr": 3.0}])
    assert [g["lr"] for g in more.param_groups] == [0.1, 0.1, 3.0]


def test_without_values_the_optimizer_decides() -> None:
    optimizer = optim.AdamW(param_groups(Transfer(), weight_decay=None), lr=3.0, weight_decay=0.7)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(3.0, 0.7), (3.0, 0.0)]


def test_print() -> None:
    model = Transfer()
    groups = param_groups(model, lr=1e-3, overrides={"head": {"lr": 0.01}}, freeze=model.backbone[0])
    assert str(groups) == (
        "group 0: lr=0.001, weight_decay=0; 3 tensors, 12 elements\n"
        "  backbone.1.weight  4  weight of LayerNorm\n"
        "  backbone.1.bias    4  bias of LayerNorm\n"
        "  backbone.2.bias    4  bias of Linear\n"
        "group 1: lr=0.001, weight_decay=0.01; 1 tensor, 16 elements\n"
        "  backbone.2.weight  4×4  weight of Linear\n"
        "group 2: lr=0.01, weight_decay=0.01; 1 tensor, 8 elements\n"
        "  head.weight  2×4  weight of Linear; overrides 'head'\n"
        "group 3: lr=0.01, weight_decay=0; 1 tensor, 2 elements\n"
        "  head.bias  2  bias of Linear; overrides 'head'\n"
        "frozen: 2 tensors, 16 elements\n"
        "  backbone.0.weight  4×3  weight of Linear -> lr=0.001, weight_decay=0.01\n"
        "  backbone.0.bias    4    bias of Linear -> lr=0.001, weight_decay=0"
    )
    assert repr(groups).splitlines()[-1] == "frozen: 2 tensors, 16 elements"
    assert len(repr(groups).splitlines()) == 5
    assert "Tensor" not in repr(groups.assignments)


# --- unfreezing -------------------------------------------------------------------------------------------------------

Step = Callable[[], None]
OPTIMIZERS = [
    pytest.param(cls, options, id=f"{cls.__module__.split('.')[0]}.{cls.__name__}")
    for cls, options in [
        (torch.optim.AdamW, {}),
        (optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (optim.SGD, {"momentum": 0.9}),
    ]
]


def training(cls: Any, options: dict[str, Any], *, seed: int = 0) -> tuple[Transfer, Groups, Any, Any, Step]:
    torch.manual_seed(seed)
    model = Transfer()
    groups = param_groups(model, lr=0.1, overrides={"backbone": {"lr": 0.01}}, freeze="backbone")
    optimizer = cls(groups, **options)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
        scheduler.step()

    return model, groups, optimizer, scheduler, step


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_unfreezing_keeps_state_and_schedule(cls: Any, options: dict[str, Any]) -> None:
    model, groups, optimizer, scheduler, step = training(cls, options)
    frozen = [p.clone() for p in model.backbone.parameters()]
    for _ in range(3):
        step()
    assert all(map(torch.equal, frozen, model.backbone.parameters()))
    assert all(p.grad is None for p in model.backbone.parameters())
    state = {p: copy.deepcopy(optimizer.state[p]) for p in model.head.parameters()}

    new = unfreeze(optimizer, groups, "backbone.2", scheduler=scheduler)
    assert [g["param_names"] for g in new] == [["backbone.2.weight"], ["backbone.2.bias"]]
    assert [g["weight_decay"] for g in new] == [0.01, 0.0]
    assert [g["lr"] for g in new] == [pytest.approx(0.01 / 4)] * 2
    assert scheduler.base_lrs == [0.1, 0.1, 0.01, 0.01]
    assert len(groups) == 4
    assert groups.frozen == ("backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias")
    for p, kept in state.items():
        for key, value in kept.items():
            assert value is None or torch.equal(optimizer.state[p][key], value)

    before = [p.clone() for p in model.backbone.parameters()]
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True)]
    assert changed == [False, False, False, False, True, True]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 / 5, 0.1 / 5, 0.01 / 5, 0.01 / 5])
    unfreeze(optimizer, groups, scheduler=scheduler)
    step()
    assert groups.frozen == ()
    assert all(p.requires_grad and p in optimizer.state for p in model.parameters())
    assert len(scheduler.get_last_lr()) == len(groups) == 6
    assert "frozen" not in str(groups)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_resuming_after_unfreezing_continues_bit_for_bit(cls: Any, options: dict[str, Any]) -> None:
    model, groups, optimizer, scheduler, step = training(cls, options)
    for i in range(6):
        if i == 2:
            unfreeze(optimizer, groups, "backbone.2", scheduler=scheduler, lr=0.02)
        step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
    for _ in range(3):
        step()

    other, groups, optimizer, scheduler, step = training(cls, options, seed=1)
    unfreeze(optimizer, groups, "backbone.2", scheduler=scheduler, lr=0.02)
    file.seek(0)
    for part, saved in zip((other, optimizer, scheduler), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    for _ in range(3):
        step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert [g["param_names"] for g in optimizer.param_groups[2:]] == [["backbone.2.weight"], ["backbone.2.bias"]]


def test_resuming_by_names_does_not_mind_the_order_of_a_group() -> None:
    _, groups, optimizer, scheduler, step = training(optim.AdamW, {})
    unfreeze(optimizer, groups, scheduler=scheduler)
    step()
    saved = optimizer.state_dict()
    _, groups, other, scheduler, _ = training(optim.AdamW, {})
    unfreeze(other, groups, scheduler=scheduler)
    for group in other.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()
    other.load_state_dict(saved)
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for p, q in zip(ours["params"], reversed(theirs["params"]), strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def sequential(optimizer: Any) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 8, 0.003)], [4])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: (1 + t) ** -0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 6]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.004),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.004),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, [g["lr"] / 4 for g in o.param_groups], [g["lr"] for g in o.param_groups], 4
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], 12),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "Schedule": lambda o: Schedule(o, lr=cosine(12), momentum=linear(9)),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [g["lr"] / 2 for g in o.param_groups], 5),
}


@pytest.mark.parametrize("ratio", [1.0, 0.1])
@pytest.mark.parametrize("when", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_late_group_has_the_learning_rates_of_an_early_one(
    make: Callable[[Any], Any], when: int, ratio: float
) -> None:
    """Under every scheduler of torch: learning rate, what is reported of it, and momentum where it is cycled."""

    def run(late: bool) -> list[list[float]]:
        model = Transfer()
        arguments = {"weight_decay": None, "no_decay": (), "lr": 0.1, "overrides": {"backbone": {"lr": 0.1 * ratio}}}
        groups = param_groups(model, **arguments, freeze="backbone" if late else ())
        if late:
            optimizer = optim.SGD(groups, momentum=0.9)
        else:  # the head first, as when it is joined by the backbone
            optimizer = optim.SGD(sorted(groups, key=lambda g: "head" not in g["params"][0][0]), momentum=0.9)
        scheduler, seen = make(optimizer), []
        for t in range(11):
            if late and t == when:
                unfreeze(optimizer, groups, scheduler=scheduler)
            if t >= when:
                by_name = {
                    name: [g["lr"], last, g["momentum"]]
                    for g, last in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True)
                    for name in g["param_names"]
                }
                seen.append([value for name in sorted(by_name) for value in by_name[name]])
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        return seen

    for early, late in zip(run(False), run(True), strict=True):
        assert late == pytest.approx(early, rel=1e-12)


def test_learning_rates_that_are_tensors_stay_tensors() -> None:
    model = Transfer()
    groups = param_groups(model, freeze="backbone", overrides={"backbone": {"lr": 0.01}})
    optimizer = optim.AdamW(groups, lr=torch.tensor(0.1, dtype=torch.float64))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    unfreeze(optimizer, groups, scheduler=scheduler)
    assert isinstance(optimizer.param_groups[-1]["lr"], Tensor)
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"].item() == pytest.approx(0.0025)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.025)


def test_a_schedule_of_weight_decay_that_follows_the_optimizer() -> None:
    model, groups, optimizer, *_ = training(optim.SGD, {})
    decay = Schedule(optimizer, weight_decay=linear(4, end=0.0), follow=True)
    optimizer.step()
    unfreeze(optimizer, groups, "backbone.0", scheduler=decay)
    values = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert values == {
        "head.weight": pytest.approx(0.0075), "head.bias": 0.0,
        "backbone.0.weight": pytest.approx(0.0075), "backbone.0.bias": 0.0,
    }  # fmt: skip
    assert model.backbone[0].weight.requires_grad


def test_unfreezing_is_refused_and_changes_nothing() -> None:
    model, groups, optimizer, scheduler, step = training(optim.AdamW, {})
    step()

    def refused(message: str, *arguments: Any, error: type[Exception] = ValueError, **keywords: Any) -> None:
        with pytest.raises(error, match=message):
            unfreeze(*(arguments or (optimizer, groups)), **{"scheduler": scheduler, **keywords})
        assert len(optimizer.param_groups) == len(groups) == len(scheduler.base_lrs) == 2
        assert not any(p.requires_grad for p in model.backbone.parameters())

    refused("unfreeze: match: 'backbon' means no frozen parameter; it must match whole", match="backbon")
    refused("unfreeze: match: 'head' means no frozen parameter; near it: backbone", match="head")
    refused("unfreeze: the optimizer has a scheduler; pass scheduler=, or", scheduler=None)
    refused(r"unfreeze: lr must be in \[0, inf\), got -1", lr=-1)
    refused(r"AdamW: betas\[1\] must be in \[0, 1\), got 2", betas=(0.9, 2))
    refused("unfreeze: the optimizer has 1 groups, not these 2", optim.SGD(model.head.parameters()), groups)
    other = [{"params": [p]} for p in (model.head.bias, model.head.weight)]
    refused("unfreeze: group 0 of the optimizer has other parameters than that of groups", optim.SGD(other), groups)
    refused("unfreeze: no parameter of these groups is frozen", optimizer, param_groups(model.head))
    zero = param_groups(model, lr=0.0, overrides={"backbone": {"lr": 1.0}})
    refused("unfreeze: the learning rate of group 0 is 0 and scales to no other", optim.SGD(zero), zero)
    unfreeze(optimizer, groups, scheduler=())
    assert optimizer.param_groups[-1]["lr"] == 0.01

    groups = param_groups(model, freeze="backbone", overrides={"backbone.2.bias": {"betas": (0.9, 2)}})
    optimizer = optim.AdamW(groups)
    with pytest.raises(ValueError, match="AdamW: betas"):
        unfreeze(optimizer, groups)
    assert len(optimizer.param_groups) == len(groups) == 2
    optimizer.step()


def test_groups_can_be_copied_with_their_model() -> None:
    model, groups, *_ = training(optim.AdamW, {})
    model, groups = copy.deepcopy((model, groups))
    optimizer = optim.AdamW(groups)
    unfreeze(optimizer, groups)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
