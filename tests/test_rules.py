"""Every optimizer of schuss passes every generic check, in every form it can take."""

import pytest

from schuss import optim
from schuss.testing import CHECKS

FORMS = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}],
    "RMSprop": [{}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}],
    "Adam": [{}, {"amsgrad": True}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "AdamW": [{}, {"amsgrad": True}],
    "NAdam": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "ASGD": [{}, {"t0": 2}],
    "ADOPT": [{}, {"clip_exp": None}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "Lion": [{}, {"weight_decay": 0.1}],
    "ScheduleFreeSGD": [{}, {"weight_decay": 0.1, "warmup_steps": 4, "r": 1.0}],
    "ScheduleFreeAdamW": [{}, {"weight_decay": 0.1, "warmup_steps": 4, "r": 1.0}],
    "ScheduleFreeRAdam": [{}, {"weight_decay": 0.1, "silent_sgd_phase": False}],
    "NAdamW": [{}],
    "AdaBelief": [{}, {"amsgrad": True}, {"rectify": True}, {"weight_decay": 0.1, "decoupled_weight_decay": False}],
    "Adan": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "no_prox": True}],
    "AdEMAMix": [{}, {"beta3_warmup": 4, "alpha_warmup": 5, "weight_decay": 0.1}],
    "LaProp": [{}, {"weight_decay": 0.1}],
    "Signum": [{}, {"momentum": 0}, {"weight_decay": 0.1}],
    "LARS": [{}, {"momentum": 0, "weight_decay": 0.1}, {"nesterov": True}, {"adapt": False}],
    "LAMB": [{}, {"bias_correction": False}, {"phi": (0.5, 2.0)}, {"adapt": False}],
    "MARS": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"gamma": 0.0}],
    "Prodigy": [
        {"d0": 0.1},
        {"d0": 0.1, "weight_decay": 0.1, "decouple": False},
        {"d0": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.1},
    ],
    "Adafactor": [
        {},
        {"weight_decay": 0.1, "d": 2.0, "eps": (1e-4, 1e-2)},
        {"beta1": 0.9, "warmup_init": True},
        {"relative_step": False, "scale_parameter": False},
    ],
    "Muon": [
        {},
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {"ns_coefficients": "polar_express", "ns_steps": 3},
    ],
    "NorMuon": [{}, {"weight_decay": 0.0, "beta2": 0.5}],
    "SOAP": [{}, {"precondition_frequency": 1, "betas": (0.9, 0.5)}, {"normalize_grads": True, "max_precond_dim": 5}],
    "Shampoo": [
        {},
        {"precondition_frequency": 1, "start_preconditioning_step": 1, "grafting": None, "betas": (0.0, 1.0)},
        {"precondition_frequency": 2, "start_preconditioning_step": 2, "block_size": 3, "momentum": 0.5},
        {"start_preconditioning_step": 1, "grafting": "sgd", "block_size": 2, "precondition_1d": True},
    ],
}


def _cases():
    for cls in optim.RULES:
        for form in FORMS.get(cls.__name__, [{}]):
            for check in CHECKS:
                label = "-".join([cls.__name__, *form, check.__name__])
                yield pytest.param(cls, form, check, id=label)


@pytest.mark.parametrize(("cls", "form", "check"), [*_cases()])
def test_check(cls, form, check):
    check(cls, form)
