"""What the tests share: configurations of every optimizer, inputs that are errors, parameters and gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from schuss import optim
from schuss.formula import matrix_function

Kwargs = dict[str, Any]

CASES: dict[str, list[Kwargs]] = {
    "SGD": [
        dict(lr=0.1),
        dict(lr=0.1, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9),
        dict(lr=0.1, momentum=0.9, dampening=0.5),
        dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9, nesterov=True),
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True),
    ],
    "Adagrad": [
        dict(lr=0.1),
        dict(lr=0.1, lr_decay=0.1),
        dict(lr=0.1, initial_accumulator_value=0.5),
        dict(lr=0.1, weight_decay=0.1, eps=1e-3),
        dict(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, maximize=True),
    ],
    "Adadelta": [
        dict(),
        dict(lr=0.5, rho=0.8, eps=1e-3),
        dict(lr=0.5, rho=0.8, weight_decay=0.1, maximize=True),
    ],
    "RMSprop": [
        dict(lr=0.01),
        dict(lr=0.01, alpha=0.9, eps=1e-3),
        dict(lr=0.01, weight_decay=0.1),
        dict(lr=0.01, momentum=0.9),
        dict(lr=0.01, centered=True),
        dict(lr=0.01, centered=True, momentum=0.9, weight_decay=0.1, maximize=True),
    ],
    "Adam": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.0, 0.5), eps=1e-3),
        dict(lr=0.01, weight_decay=0.1),
        dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        dict(lr=0.01, amsgrad=True),
        dict(lr=0.01, amsgrad=True, weight_decay=0.1, maximize=True),
    ],
    "AdamW": [
        dict(lr=0.01),
        dict(lr=0.01, weight_decay=0),
        dict(lr=0.01, amsgrad=True, betas=(0.8, 0.9)),
        dict(lr=0.01, amsgrad=True, weight_decay=0.1, maximize=True),
    ],
    "NAdam": [
        dict(lr=0.01),
        dict(lr=0.01, momentum_decay=0.5),
        dict(lr=0.01, weight_decay=0.1),
        dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.05, maximize=True),
    ],
    "RAdam": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.8, 0.9), eps=1e-3),
        dict(lr=0.01, weight_decay=0.1),
        dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
    ],
    "Adamax": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.8, 0.9), eps=1e-3),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "ASGD": [
        dict(lr=0.1),
        dict(lr=0.1, t0=3),
        dict(lr=0.1, lambd=0.1, alpha=0.5, t0=2),
        dict(lr=0.1, lambd=0.1, t0=2, weight_decay=0.1, maximize=True),
    ],
    "Rprop": [
        dict(lr=0.01),
        dict(lr=0.01, etas=(0.4, 1.5), step_sizes=(5e-3, 0.02)),
        dict(lr=0.01, maximize=True),
    ],
    "ADOPT": [
        dict(lr=0.01),
        dict(lr=0.01, clip_exp=None),
        dict(lr=0.01, betas=(0.8, 0.9), eps=0.5, clip_exp=0.1),
        dict(lr=0.01, weight_decay=0.1),
        dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
    ],
    "Lion": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8)),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "NAdamW": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3, weight_decay=0),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "AdaBelief": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3),
        dict(lr=0.01, rectify=True),
        dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=False),
        dict(lr=0.01, amsgrad=True, weight_decay=0.1, maximize=True),
    ],
    "Adan": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8, 0.6), eps=1e-3),
        dict(lr=0.01, weight_decay=0.1, no_prox=True),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "AdEMAMix": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.0, 0.5, 0.6), eps=1e-3),
        dict(lr=0.01, alpha=5.0, betas=(0.9, 0.999, 0.99), beta3_warmup=6, alpha_warmup=4),
        dict(lr=0.01, alpha=8.0, beta3_warmup=10, alpha_warmup=10, weight_decay=0.1, maximize=True),
    ],
    "LaProp": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "Signum": [
        dict(lr=0.01),
        dict(lr=0.01, momentum=0),
        dict(lr=0.01, momentum=0.5, weight_decay=0.1, maximize=True),
    ],
    "ScheduleFreeSGD": [
        dict(lr=0.1),
        dict(lr=0.1, momentum=1.0, warmup_steps=5),
        dict(lr=0.1, momentum=0.5, weight_lr_power=0.0, r=1.0),
        dict(lr=0.1, weight_decay=0.1, warmup_steps=3, r=1.0, weight_lr_power=1.0, maximize=True),
    ],
    "ScheduleFreeAdamW": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3, r=1.0),
        dict(lr=0.01, warmup_steps=5, weight_lr_power=1.0),
        dict(lr=0.01, weight_decay=0.1, warmup_steps=3, r=1.0, weight_lr_power=1.0, maximize=True),
    ],
    "ScheduleFreeRAdam": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.8, 0.9), eps=1e-3, silent_sgd_phase=False),
        dict(lr=0.01, weight_decay=0.1, r=1.0, weight_lr_power=1.0, silent_sgd_phase=False, maximize=True),
    ],
    "LARS": [
        dict(lr=0.5, trust_coefficient=0.1),
        dict(lr=0.5, trust_coefficient=0.1, momentum=0, eps=0.1),
        dict(lr=0.1, adapt=False, weight_decay=0.1),
        dict(lr=0.5, trust_coefficient=0.1, nesterov=True, weight_decay=0.1, maximize=True),
    ],
    "LAMB": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3, weight_decay=0, bias_correction=False),
        dict(lr=0.01, adapt=False),
        dict(lr=0.01, phi=(0.5, 2.0), weight_decay=0.1, maximize=True),
    ],
    "StableAdamW": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), eps=1e-3, weight_decay=0),
        dict(lr=0.01, weight_decay=0.1, maximize=True),
    ],
    "MARS": [
        dict(lr=0.01),
        dict(lr=0.01, gamma=0, clip=float("inf"), weight_decay=0.1),
        dict(lr=0.01, betas=(0.5, 0.8), gamma=0.1, clip=0.5, amsgrad=True, weight_decay=0.1, maximize=True),
    ],
    "Prodigy": [
        dict(lr=1.0, d0=1e-2),
        dict(lr=1.0, d0=1e-2, betas=(0.5, 0.8), beta3=0.9, weight_decay=0.1, decouple=False),
        dict(
            lr=0.5,
            d0=1e-2,
            use_bias_correction=True,
            safeguard_warmup=True,
            growth_rate=1.1,
            d_coef=2.0,
            weight_decay=0.1,
            maximize=True,
        ),
    ],
    "Adafactor": [
        dict(lr=0.1),
        dict(lr=0.1, weight_decay=0.1),
        dict(lr=0.1, beta2_decay=-0.5, eps=(1e-3, 0.5), d=2.0),
        dict(lr=0.1, beta2_decay=-0.5, eps=(None, 1e-2), d=1.5, weight_decay=0.1, maximize=True),
    ],
    "Muon": [
        dict(lr=0.1),
        dict(lr=0.1, momentum=0.8, nesterov=False),
        dict(lr=0.1, weight_decay=0, ns_coefficients=(2.0, -1.5, 0.5), eps=0.5),
        dict(lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ],
    "NorMuon": [
        dict(lr=0.1),
        dict(lr=0.1, beta2=0.5, eps2=1e-3, weight_decay=0),
        dict(lr=0.1, weight_decay=0.2, nesterov=False, adjust_lr_fn="match_rms_adamw", maximize=True),
    ],
    "SOAP": [
        dict(lr=0.01),
        dict(lr=0.01, betas=(0.5, 0.8), shampoo_beta=0.6, eps=1e-3, precondition_frequency=1, weight_decay=0),
        dict(lr=0.01, normalize_grads=True, correct_bias=False, max_precond_dim=4, precondition_frequency=3),
        dict(lr=0.01, betas=(0.8, 0.9), precondition_frequency=2, weight_decay=0.1, maximize=True),
    ],
    "Shampoo": [
        dict(lr=0.01),
        dict(lr=0.01, grafting=None, betas=(0.0, 1.0), precondition_frequency=1, start_preconditioning_step=1),
        dict(lr=0.01, grafting="sgd", momentum=0.9, exponent=0.5, precondition_frequency=2, eps=1e-3),
        dict(
            lr=0.01,
            betas=(0.5, 0.8),
            grafting="rmsprop",
            block_size=2,
            precondition_frequency=2,
            start_preconditioning_step=3,
            momentum=0.5,
            nesterov=True,
            weight_decay=0.1,
            maximize=True,
        ),
    ],
}
"""Every form of every optimizer. The last one of a class has as much switched on as goes together."""

GROUPS: dict[str, list[Kwargs]] = {
    "SGD": [{}, dict(lr=0.3, weight_decay=0.1), dict(momentum=0.9, maximize=True), dict(momentum=0.5, nesterov=True)],
    "Adagrad": [{}, dict(lr=0.3, weight_decay=0.1), dict(lr_decay=0.5, maximize=True), dict(eps=0.1)],
    "Adadelta": [{}, dict(lr=0.3, weight_decay=0.1), dict(rho=0.5, maximize=True), dict(eps=0.1)],
    "RMSprop": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(momentum=0.9, maximize=True),
        dict(centered=True, momentum=0.5),
    ],
    "Adam": [{}, dict(lr=0.3, weight_decay=0.1), dict(amsgrad=True, maximize=True), dict(decoupled_weight_decay=True)],
    "AdamW": [{}, dict(lr=0.3, weight_decay=0), dict(amsgrad=True, maximize=True), dict(betas=(0.5, 0.6))],
    "NAdam": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(momentum_decay=0.5, maximize=True),
        dict(weight_decay=0.1, decoupled_weight_decay=True),
    ],
    "RAdam": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(betas=(0.5, 0.6), maximize=True),
        dict(weight_decay=0.1, decoupled_weight_decay=True),
    ],
    "Adamax": [{}, dict(lr=0.3, weight_decay=0.1), dict(betas=(0.5, 0.6), maximize=True), dict(eps=0.1)],
    "ASGD": [{}, dict(lr=0.3, weight_decay=0.1), dict(t0=2, maximize=True), dict(lambd=0.1, alpha=0.5)],
    "Rprop": [{}, dict(lr=0.3), dict(etas=(0.4, 1.5), maximize=True), dict(step_sizes=(5e-3, 0.02))],
    "ADOPT": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(clip_exp=None, maximize=True),
        dict(weight_decay=0.1, decoupled_weight_decay=True),
    ],
    "Lion": [{}, dict(lr=0.3, weight_decay=0.1), dict(betas=(0.5, 0.6), maximize=True), dict(weight_decay=0.01)],
    "NAdamW": [{}, dict(lr=0.3, weight_decay=0), dict(betas=(0.5, 0.6), maximize=True), dict(eps=0.1)],
    "AdaBelief": [
        {},
        dict(lr=0.3, weight_decay=0.1, decoupled_weight_decay=False),
        dict(amsgrad=True, maximize=True),
        dict(rectify=True, eps=1e-3),
    ],
    "Adan": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(betas=(0.98, 0.92, 0.5), maximize=True),
        dict(weight_decay=0.1, no_prox=True),
    ],
    "AdEMAMix": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(alpha=8.0, alpha_warmup=3, maximize=True),
        dict(betas=(0.9, 0.999, 0.9), beta3_warmup=4),
    ],
    "LaProp": [{}, dict(lr=0.3, weight_decay=0.1), dict(betas=(0.5, 0.6), maximize=True), dict(eps=0.1)],
    "Signum": [{}, dict(lr=0.3, weight_decay=0.1), dict(momentum=0, maximize=True), dict(momentum=0.5)],
    "ScheduleFreeSGD": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(momentum=0.5, maximize=True),
        dict(warmup_steps=3, r=1.0),
    ],
    "ScheduleFreeAdamW": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(betas=(0.5, 0.6), maximize=True),
        dict(warmup_steps=3, r=1.0),
    ],
    "ScheduleFreeRAdam": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(betas=(0.5, 0.6), silent_sgd_phase=False, maximize=True),
        dict(weight_lr_power=0.0, eps=0.1),
    ],
    "LARS": [
        {},
        dict(lr=0.3, weight_decay=0.1, adapt=False),
        dict(momentum=0, maximize=True),
        dict(momentum=0.5, nesterov=True),
    ],
    "LAMB": [
        {},
        dict(lr=0.3, weight_decay=0.1, adapt=False),
        dict(bias_correction=False, maximize=True),
        dict(phi=(0.5, 2.0)),
    ],
    "StableAdamW": [{}, dict(lr=0.3, weight_decay=0), dict(betas=(0.5, 0.6), maximize=True), dict(eps=0.1)],
    "MARS": [
        {},
        dict(lr=0.3, weight_decay=0.1, gamma=0, clip=float("inf")),
        dict(amsgrad=True, maximize=True),
        dict(gamma=0.1, clip=0.5),
    ],
    "Prodigy": [
        {},
        dict(lr=0.0, weight_decay=0.1),
        dict(decouple=False, weight_decay=0.1, maximize=True),
        dict(safeguard_warmup=True, use_bias_correction=True),
    ],
    "Adafactor": [
        {},
        dict(lr=0.3, weight_decay=0.1),
        dict(d=2.0, maximize=True),
        dict(beta2_decay=-0.5, eps=(1e-2, 0.1)),
    ],
    "Muon": [
        {},
        dict(lr=0.3, weight_decay=0),
        dict(momentum=0.5, nesterov=False),
        dict(ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ],
    "NorMuon": [
        {},
        dict(lr=0.3, weight_decay=0),
        dict(beta2=0.5, maximize=True),
        dict(nesterov=False, eps2=0.1),
    ],
    "SOAP": [
        {},
        dict(lr=0.3, weight_decay=0),
        dict(betas=(0.5, 0.6), precondition_frequency=2, maximize=True),
        dict(max_precond_dim=0, normalize_grads=True),
    ],
    "Shampoo": [
        {},
        dict(lr=0.3, weight_decay=0.1, precondition_frequency=2, start_preconditioning_step=1),
        dict(grafting="sgd", momentum=0.5, maximize=True),
        dict(grafting="adagrad", block_size=2, precondition_frequency=1, start_preconditioning_step=1),
    ],
}
"""Hyperparameters of four groups of one optimizer: decay and none, maximize and not, with and without a state."""

OWN: dict[str, tuple[str, ...]] = {
    "Adafactor": ("beta1", "relative_step", "scale_parameter", "warmup_init"),
    "Muon": ("maximize",),
}
"""Hyperparameters that torch's optimizer of the same name does not have."""

INTERVAL = r"must be in \[0, inf\), got"

ERRORS: list[tuple[str, Kwargs, type[Exception], str]] = [
    *((name, dict(lr=-0.1), ValueError, rf"{name}: lr {INTERVAL} -0\.1$") for name in CASES),
    *((name, dict(lr=float("nan")), ValueError, rf"{name}: lr {INTERVAL} nan$") for name in CASES),
    *((name, dict(lr="0.1"), TypeError, rf"{name}: lr must be a number in .*, got '0\.1' \(str\)$") for name in CASES),
    *(
        (name, dict(lr=torch.tensor([0.1, 0.2])), ValueError, rf"{name}: Tensor lr must be 1-element.*\(2,\)$")
        for name in CASES
    ),
    *((name, dict(lr=torch.tensor(-1.0)), ValueError, rf"{name}: lr {INTERVAL} tensor\(-1\.\)$") for name in CASES),
    *((name, dict(lr=True), TypeError, rf"{name}: lr must be a number") for name in CASES),
    *(
        (name, dict(weight_decay=-1e-9), ValueError, rf"{name}: weight_decay {INTERVAL} -1e-09$")
        for name in CASES
        if name != "Rprop"
    ),
    *(
        (name, dict(eps=-1e-9), ValueError, rf"{name}: eps {INTERVAL} -1e-09$")
        for name in CASES
        if name not in ("SGD", "ASGD", "Rprop", "Lion", "Signum", "ScheduleFreeSGD", "Adafactor", "Shampoo")
    ),
    *(
        (name, dict(betas=betas), ValueError, rf"{name}: betas{where}")
        for name in CASES
        if name not in ("SGD", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop", "Signum", "LARS", "Adan", "AdEMAMix")
        and name not in ("Adafactor", "Muon", "NorMuon", "Shampoo")
        and not name.startswith("ScheduleFree")
        for betas, where in (
            ((1.0, 0.9), r"\[0\] must be in \[0, 1\), got 1\.0$"),
            ((-0.1, 0.9), r"\[0\] must be in \[0, 1\), got -0\.1$"),
            ((0.9, 1.2), r"\[1\] must be in \[0, 1\), got 1\.2$"),
            ((0.9,), r" must be two numbers, got \(0\.9,\)$"),
            (0.9, r" must be two numbers, got 0\.9$"),
        )
    ),
    ("SGD", dict(momentum=-0.5), ValueError, rf"SGD: momentum {INTERVAL} -0\.5$"),
    ("SGD", dict(dampening=float("inf")), ValueError, r"SGD: dampening must be in \(-inf, inf\), got inf$"),
    ("SGD", dict(nesterov=True), ValueError, r"SGD: Nesterov momentum requires a momentum and zero dampening.*=0,"),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.5), ValueError, r"SGD: Nesterov .* dampening=0\.5$"),
    ("Adagrad", dict(lr_decay=-0.5), ValueError, rf"Adagrad: lr_decay {INTERVAL} -0\.5$"),
    (
        "Adagrad",
        dict(initial_accumulator_value=-0.5),
        ValueError,
        rf"Adagrad: initial_accumulator_value {INTERVAL} -0\.5$",
    ),
    ("Adadelta", dict(rho=1.1), ValueError, r"Adadelta: rho must be in \[0, 1\], got 1\.1$"),
    ("Adadelta", dict(rho=-0.1), ValueError, r"Adadelta: rho must be in \[0, 1\], got -0\.1$"),
    ("RMSprop", dict(momentum=-1.0), ValueError, rf"RMSprop: momentum {INTERVAL} -1\.0$"),
    ("RMSprop", dict(alpha=-1.0), ValueError, rf"RMSprop: alpha {INTERVAL} -1\.0$"),
    ("NAdam", dict(momentum_decay=-0.2), ValueError, rf"NAdam: momentum_decay {INTERVAL} -0\.2$"),
    ("Rprop", dict(etas=(1.0, 0.5)), ValueError, r"Rprop: etas\[0\] must be in \(0, 1\), got 1\.0$"),
    ("Rprop", dict(etas=(0.5, 1.0)), ValueError, r"Rprop: etas\[1\] must be in \(1, inf\), got 1\.0$"),
    ("Rprop", dict(step_sizes=(-1e-6, 50)), ValueError, rf"Rprop: step_sizes\[0\] {INTERVAL} -1e-06$"),
    ("ADOPT", dict(clip_exp=-0.25), ValueError, r"ADOPT: clip_exp must be None or in \[0, inf\), got -0\.25$"),
    *(
        (name, dict(betas=betas), ValueError, rf"{name}: betas{where}")
        for name in ("Adan", "AdEMAMix")
        for betas, where in (
            ((0.9, 0.8, 1.0), r"\[2\] must be in \[0, 1\), got 1\.0$"),
            ((0.9, 0.8), r" must be three numbers, got \(0\.9, 0\.8\)$"),
        )
    ),
    ("Adam", dict(betas=(0.9, 0.8, 0.7)), ValueError, r"Adam: betas must be two numbers, got \(0\.9, 0\.8, 0\.7\)$"),
    ("Adam", dict(lr=(0.1, 0.2)), TypeError, r"Adam: lr must be a number in \[0, inf\), got \(0\.1, 0\.2\) \(tuple\)$"),
    ("AdEMAMix", dict(alpha=-1.0), ValueError, rf"AdEMAMix: alpha {INTERVAL} -1\.0$"),
    *(
        ("AdEMAMix", {name: -1}, ValueError, rf"AdEMAMix: {name} must be None or in \[0, inf\), got -1$")
        for name in ("beta3_warmup", "alpha_warmup")
    ),
    ("Signum", dict(momentum=1.0), ValueError, r"Signum: momentum must be in \[0, 1\), got 1\.0$"),
    *(
        ("ScheduleFreeSGD", dict(momentum=momentum), ValueError, rf"SGD: momentum must be in \(0, 1\], got {momentum}$")
        for momentum in (0, -0.5, 1.5)
    ),
    *(
        (name, dict(betas=betas), ValueError, rf"{name}: betas\[{i}\] must be in {bound}, got {betas[i]}$")
        for name in ("ScheduleFreeAdamW", "ScheduleFreeRAdam")
        for betas, i, bound in (
            ((0.0, 0.9), 0, r"\(0, 1\]"),
            ((1.5, 0.9), 0, r"\(0, 1\]"),
            ((0.9, 1.0), 1, r"\[0, 1\)"),
        )
    ),
    *(
        (name, {argument: -1}, ValueError, rf"{name}: {argument} {INTERVAL} -1$")
        for name in ("ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam")
        for argument in ("r", "weight_lr_power", *(["warmup_steps"] if "RAdam" not in name else []))
    ),
    ("ScheduleFreeRAdam", dict(betas=(0.9, 0.6)), ValueError, r"betas\[1\] must be above 0\.6 .* got 0\.6; set silent"),
    ("LARS", dict(momentum=-0.5), ValueError, rf"LARS: momentum {INTERVAL} -0\.5$"),
    ("LARS", dict(trust_coefficient=-1.0), ValueError, rf"LARS: trust_coefficient {INTERVAL} -1\.0$"),
    ("LARS", dict(nesterov=True, momentum=0), ValueError, r"LARS: nesterov=True needs momentum, got momentum=0$"),
    ("LAMB", dict(phi=(-1.0, 1.0)), ValueError, rf"LAMB: phi\[0\] {INTERVAL} -1\.0$"),
    ("LAMB", dict(phi=(0.0, 0.0)), ValueError, r"LAMB: phi\[1\] must be in \(0, inf\], got 0\.0$"),
    ("LAMB", dict(phi=(2.0, 1.0)), ValueError, r"LAMB: phi must be a lower bound and .*, got \(2\.0, 1\.0\)$"),
    ("MARS", dict(gamma=-0.1), ValueError, rf"MARS: gamma {INTERVAL} -0\.1$"),
    ("MARS", dict(clip=0.0), ValueError, r"MARS: clip must be in \(0, inf\], got 0\.0$"),
    ("Prodigy", dict(beta3=1.0), ValueError, r"Prodigy: beta3 must be None or in \[0, 1\), got 1\.0$"),
    ("Prodigy", dict(d0=0.0), ValueError, r"Prodigy: d0 must be in \(0, inf\), got 0\.0$"),
    ("Prodigy", dict(d_coef=0.0), ValueError, r"Prodigy: d_coef must be in \(0, inf\), got 0\.0$"),
    ("Prodigy", dict(growth_rate=0.5), ValueError, r"Prodigy: growth_rate must be in \[1, inf\], got 0\.5$"),
    ("Adafactor", dict(eps=(-1e-9, 1e-3)), ValueError, r"Adafactor: eps\[0\] must be None or in .*, got -1e-09$"),
    ("Adafactor", dict(eps=(None, -1e-9)), ValueError, rf"Adafactor: eps\[1\] {INTERVAL} -1e-09$"),
    ("Adafactor", dict(eps=1e-3), ValueError, r"Adafactor: eps must be two numbers, got 0\.001$"),
    ("Adafactor", dict(beta2_decay=0.8), ValueError, r"Adafactor: beta2_decay must be in \(-inf, 0\], got 0\.8$"),
    ("Adafactor", dict(d=0.5), ValueError, r"Adafactor: d must be in \[1, inf\), got 0\.5$"),
    ("Adafactor", dict(beta1=1.0), ValueError, r"Adafactor: beta1 must be None or in \[0, 1\), got 1\.0$"),
    *(
        (name, arguments, ValueError, rf"{name}: {message}")
        for name in ("Muon", "NorMuon")
        for arguments, message in (
            (dict(momentum=1.5), r"momentum must be in \[0, 1\], got 1\.5$"),
            (dict(ns_steps=100), r"ns_steps must be in \[0, 100\), got 100$"),
            (dict(adjust_lr_fn="rms"), r"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got 'rms'$"),
            (dict(ns_coefficients="jordn"), r"ns_coefficients are no preset .*: did you mean 'jordan'\?$"),
            (dict(ns_coefficients=(3.0, -4.0)), r"ns_coefficients must be three numbers, or such triples, or one of"),
            (dict(ns_coefficients=3.0), r"ns_coefficients must be three numbers, .*, got 3\.0$"),
            (dict(ns_coefficients=[("a", 1, 2)]), r"ns_coefficients must be three numbers, .*, got \[\('a', 1, 2\)\]$"),
            (dict(ns_coefficients=()), r"ns_coefficients must be three numbers, .*, got \(\)$"),
        )
    ),
    ("NorMuon", dict(beta2=1.0), ValueError, r"NorMuon: beta2 must be in \[0, 1\), got 1\.0$"),
    ("NorMuon", dict(eps2=-1.0), ValueError, rf"NorMuon: eps2 {INTERVAL} -1\.0$"),
    *(
        (name, arguments, ValueError, rf"{name}: {message}")
        for name in ("SOAP", "Shampoo")
        for arguments, message in (
            (dict(precondition_frequency=0), r"precondition_frequency must be in \[1, inf\), got 0$"),
            (dict(precision="float16"), r"precision must be None or 'bfloat16', got 'float16'$"),
            (dict(capturable=True), r"capturable must be False, since the host renews matrices .*; got True$"),
        )
    ),
    ("SOAP", dict(shampoo_beta=1.0), ValueError, r"SOAP: shampoo_beta must be None or in \[0, 1\), got 1\.0$"),
    ("SOAP", dict(max_precond_dim=-1), ValueError, rf"SOAP: max_precond_dim {INTERVAL} -1$"),
    ("Shampoo", dict(betas=(1.0, 0.9)), ValueError, r"Shampoo: betas\[0\] must be in \[0, 1\), got 1\.0$"),
    ("Shampoo", dict(betas=(0.9, 1.2)), ValueError, r"Shampoo: betas\[1\] must be in \[0, 1\], got 1\.2$"),
    ("Shampoo", dict(eps=0.0), ValueError, r"Shampoo: eps must be in \(0, inf\), got 0\.0$"),
    ("Shampoo", dict(block_size=0), ValueError, r"Shampoo: block_size must be in \[1, inf\), got 0$"),
    ("Shampoo", dict(exponent=0.0), ValueError, r"Shampoo: exponent must be None or in \(0, inf\), got 0\.0$"),
    ("Shampoo", dict(grafting="Adam"), ValueError, r"Shampoo: grafting must be None, 'sgd', .* or 'adam', got 'Adam'$"),
    ("Shampoo", dict(nesterov=True), ValueError, r"Shampoo: nesterov=True needs momentum, got momentum=0$"),
    ("ASGD", dict(t0="late"), TypeError, r"ASGD: t0 must be a number in \(-inf, inf\), got 'late' \(str\)$"),
    *(
        (name, dict(fused=True, foreach=True), RuntimeError, r"`fused` and `foreach` cannot be `True` together")
        for name in ("SGD", "Adagrad", "Adam", "AdamW")
    ),
    *(
        (name, dict(fused=True, differentiable=True), RuntimeError, r"`fused` does not support `differentiable`")
        for name in ("SGD", "Adagrad", "Adam", "AdamW")
    ),
    ("Adam", dict(backend="cuda"), ValueError, r"Adam: backend must be one of auto, numba, .*, got 'cuda'$"),
]
"""Constructor arguments that are errors, and what the message says. Texts name the class, the argument, its bounds."""


@dataclass(frozen=True)
class Case:
    """One optimizer in one configuration."""

    name: str
    kwargs: Kwargs

    def __str__(self) -> str:
        told = [
            k if v is True else f"{k}={v}".replace(" ", "")
            for k, v in self.kwargs.items()
            if k != "lr" or len(self.kwargs) == 1
        ]
        return "-".join([self.name, *told])

    @property
    def cls(self) -> type[Any]:
        """The class of schuss."""
        return getattr(optim, self.name)

    @property
    def torch_cls(self) -> type[Any]:
        """Its namesake in torch."""
        return getattr(torch.optim, self.name)

    def ours(self, params: Iterable[Any], **more: Any) -> Any:
        """The optimizer of schuss."""
        return self.cls(params, **(self.kwargs | more))

    def theirs(self, params: Iterable[Any], **more: Any) -> Any:
        """torch's optimizer of the same name."""
        return self.torch_cls(params, **(self.kwargs | more))

    def accepts(self, key: str) -> bool:
        """Whether groups of this optimizer have the key."""
        return key in self.cls([self.fit(torch.zeros(1))]).defaults

    def fit(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or if the optimizer takes no vectors the tensor as a matrix, a view where one can be had.

        Of two dimensions: torch's Muon, with which ours is compared, takes no others.
        """
        if self.cls.takes(torch.empty(1)):
            return tensor
        return tensor[(None,) * (2 - tensor.dim())] if tensor.dim() < 2 else tensor.flatten(1)

    def parameters(
        self,
        layouts: Sequence[str] = ("contiguous", "transposed", "0-d"),
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        *,
        backend: str = "auto",
    ) -> list[torch.nn.Parameter]:
        """`parameters`, as this optimizer takes them, and its kernels if they are asked for: some go by rows."""
        tensors = [self.fit(p.detach()) for p in parameters(layouts, dtype, seed)]
        if backend == "numba" and self.needs:
            tensors = [tensor.contiguous() for tensor in tensors]
        return [torch.nn.Parameter(tensor) for tensor in tensors]

    @property
    def needs(self) -> frozenset[str]:
        """What the rule computes with, for matrices: "vectors" of rows and columns, functions of "matrices"."""
        optimizer = self.cls([torch.zeros(1, 1)], **self.kwargs)
        return optimizer._rule.needs(optimizer._rule.variant(optimizer.param_groups[0]))


NAMES = tuple(CASES)
IN_TORCH = tuple(name for name in NAMES if hasattr(torch.optim, name))
ALL = [Case(name, kwargs) for name in NAMES for kwargs in CASES[name]]
RICH = [Case(name, CASES[name][-1]) for name in NAMES]
PLAIN = [Case(name, CASES[name][0]) for name in NAMES]


exact_matrices = pytest.mark.usefixtures("exact_matrices")
"""For tests against torch, whose Muon iterates in bfloat16 as ours does, but in another order of operations: both in
float64, so that all else can be compared exactly."""


def each(
    cases: Iterable[Case], argument: str = "case", *, torch_has: bool = False, takes_complex: bool = False
) -> Callable[[Any], Any]:
    """Parametrize a test by cases, with their names as ids.

    Args:
        cases: which.
        argument: the test's.
        torch_has: only those with a namesake in torch, for a test against it.
        takes_complex: only those that take complex parameters.
    """
    chosen = [c for c in cases if c.name in IN_TORCH or not torch_has]
    mark = pytest.mark.parametrize(argument, [c for c in chosen if c.cls.takes_complex or not takes_complex], ids=str)
    return (lambda test: exact_matrices(mark(test))) if torch_has else mark


def each_with(cases: Iterable[Case], dtypes: Iterable[torch.dtype]) -> Callable[[Any], Any]:
    """Parametrize a test against torch by cases and the dtypes that they take."""
    pairs = [
        pytest.param(case, dtype, id=f"{dtype}-{case}")
        for dtype in dtypes
        for case in cases
        if case.name in IN_TORCH and (case.cls.takes_complex or not dtype.is_complex)
    ]
    mark = pytest.mark.parametrize(("case", "dtype"), pairs)
    return lambda test: exact_matrices(mark(test))


def orthogonalize(x: torch.Tensor, coefficients: Sequence[Sequence[float]], eps: float) -> torch.Tensor:
    """The definition of Newton-Schulz iterations, in float64."""
    y = x.double() / torch.linalg.matrix_norm(x.double(), keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y


def make_matrices_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Muon, torch's and ours, orthogonalize in float64."""

    def theirs(grad: torch.Tensor, ns_coefficients: Sequence[float], ns_steps: int, eps: float) -> torch.Tensor:
        return orthogonalize(grad, [ns_coefficients] * ns_steps, eps)

    def ours(x: torch.Tensor, coefficients: Sequence[Sequence[float]], eps: float) -> torch.Tensor:
        return orthogonalize(x, coefficients, eps).to(x.dtype)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", theirs)
    monkeypatch.setattr("schuss.optim.muon.orthogonalize", matrix_function(ours))


def generator(*seed: int) -> torch.Generator:
    """A generator that depends on all the numbers."""
    return torch.Generator().manual_seed(sum(s * 1_000_003**i for i, s in enumerate(seed)) % 2**63)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Normal numbers that depend on nothing but the arguments; drawn in float64, so that dtypes see the same ones."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator(seed, 1)).to(dtype)


def _gaps(dtype: torch.dtype, seed: int) -> torch.Tensor:
    return randn(4, 10, dtype=dtype, seed=seed)[:, ::2]


def _non_dense(dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.empty_strided((3, 4), (7, 1), dtype=dtype)
    return values.copy_(randn(3, 4, dtype=dtype, seed=seed))


LAYOUTS: dict[str, Callable[[torch.dtype, int], torch.Tensor]] = {
    "contiguous": lambda dtype, seed: randn(5, 7, dtype=dtype, seed=seed),
    "transposed": lambda dtype, seed: randn(6, 3, dtype=dtype, seed=seed).t(),
    "permuted": lambda dtype, seed: randn(2, 3, 4, dtype=dtype, seed=seed).permute(2, 0, 1),
    "channels-last": lambda dtype, seed: randn(2, 3, 4, 5, dtype=dtype, seed=seed).contiguous(
        memory_format=torch.channels_last
    ),
    "0-d": lambda dtype, seed: randn(dtype=dtype, seed=seed),
    "one element": lambda dtype, seed: randn(1, 1, dtype=dtype, seed=seed),
    "empty": lambda dtype, seed: randn(0, 3, dtype=dtype, seed=seed),
    "gaps": _gaps,
    "non-dense": _non_dense,
    "offset": lambda dtype, seed: randn(11, dtype=dtype, seed=seed)[3:],
    "slice of rows": lambda dtype, seed: randn(6, 4, dtype=dtype, seed=seed)[1:3],
}
"""Ways in which a parameter can lie in memory."""

DENSE = ("contiguous", "transposed", "0-d", "one element", "empty", "channels-last")


def parameters(
    layouts: Sequence[str] = ("contiguous", "transposed", "0-d"), dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters that lie in memory in these ways; the same ones at every call."""
    return [torch.nn.Parameter(LAYOUTS[name](dtype, seed + i)) for i, name in enumerate(layouts)]


def gradient(p: torch.Tensor, *seed: int) -> torch.Tensor:
    """A gradient that lies in memory like the parameter, where autograd would make it so."""
    wide = torch.complex128 if p.is_complex() else torch.float64
    values = torch.randn(p.shape, dtype=wide, generator=generator(*seed))
    return torch.empty_like(p).detach().copy_(values)


def set_gradients(params: Sequence[torch.Tensor], step: int, *, missing: bool = False, seed: int = 7) -> None:
    """Give each parameter the gradient of a step; with `missing`, some have none, others at each step."""
    for i, p in enumerate(params):
        p.grad = None if missing and (step + i) % 3 == 1 else gradient(p, seed, step, i)


def drive(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    steps: Iterable[int] | int = 8,
    *,
    missing: bool = False,
    seed: int = 7,
) -> None:
    """Make steps with given gradients. Eight go past the fifth, where RAdam changes its form."""
    for step in range(steps) if isinstance(steps, int) else steps:
        set_gradients(params, step, missing=missing, seed=seed)
        optimizer.step()


TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 1e-6),
    torch.complex64: (1e-5, 1e-6),
    torch.complex128: (1e-12, 1e-13),
}
"""Relative and absolute. float64: a formula written in another order of operations differs by some 1e-16 a step, a
wrong formula by far more than 1e-12. float32: torch's own tests allow 1.3e-6 and 1e-5; small states ask for a smaller
absolute tolerance, and eight steps that divide by roots of differences for a larger relative one."""


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str = "", *, slack: float = 0.0) -> None:
    """Equal within the tolerance of the dtype, or within `slack`, NaN equal to NaN; dtype and shape exactly."""
    rtol, atol = TOLERANCE.get(theirs.dtype, (0, 0))
    torch.testing.assert_close(
        ours.detach(), theirs.detach(), rtol=max(rtol, slack), atol=max(atol, slack), equal_nan=True,
        check_stride=False, msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def slack(theirs: torch.optim.Optimizer) -> float:
    """How far torch's own result is from the exact one, beyond what the parameters' dtype says.

    Its NAdam reads the product of all momenta back as float32 within the step, its foreach ASGD the rate; then 1e-7 is
    `torch.testing`'s tolerance for float64. With float64 as the default dtype both are kept in float64.
    """
    rough = isinstance(theirs, torch.optim.NAdam) or (
        isinstance(theirs, torch.optim.ASGD) and any(group["foreach"] for group in theirs.param_groups)
    )
    return 1e-7 if rough and torch.get_default_dtype() == torch.float32 else 0.0


def assert_equal(ours: Any, theirs: Any, what: str = "") -> None:
    """The same, to the last bit of tensors, in nested dicts, lists and tuples; NaN equal to NaN."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"{what}: {type(ours)}"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs) or set(ours) == set(theirs), what
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{what}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), what
        for i, value in enumerate(theirs):
            assert_equal(ours[i], value, f"{what}[{i}]")
    else:
        assert ours == theirs, f"{what}: {ours!r} != {theirs!r}"


def assert_close_params(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], what: str = "", *, slack: float = 0.0
) -> None:
    """`assert_close` of each pair."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a, b, f"{what} parameter {i}", slack=slack)


def common(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimizer without the hyperparameters that torch's of the same name does not have."""
    own = OWN.get(type(optimizer).__name__, ())
    return [{key: value for key, value in group.items() if key not in own} for group in groups]


def assert_close_state(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, *, loaded_by_torch: bool = False
) -> None:
    """The state dicts agree: keys, dtypes and shapes exactly, numbers within the tolerance of their dtype.

    Loading, torch casts what NAdam and ASGD keep per parameter to the parameter's dtype: with `loaded_by_torch` the
    dtype of numbers does not count.
    """
    a, b = ours.state_dict(), theirs.state_dict()
    assert set(a) == set(b)
    assert set(a["state"]) == set(b["state"])
    for index, kept in b["state"].items():
        assert set(a["state"][index]) == set(kept), f"state of {index}"
        for key, value in kept.items():
            mine = a["state"][index][key]
            if loaded_by_torch and value.dim() == 0:
                mine, value = mine.float(), value.float()
            assert_close(mine, value, f"{key} of {index}", slack=slack(theirs))
    assert_equal(common(ours, a["param_groups"]), b["param_groups"], "param_groups")


def lockstep(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    our_params: Sequence[torch.Tensor],
    their_params: Sequence[torch.Tensor],
    steps: Iterable[int] | int = 8,
    *,
    missing: bool = False,
    then: Callable[[int], Any] | None = None,
    loaded_by_torch: bool = False,
) -> None:
    """Step two optimizers with the same gradients; parameters agree after each step, state dicts after the last."""
    for step in range(steps) if isinstance(steps, int) else steps:
        drive(ours, our_params, [step], missing=missing)
        drive(theirs, their_params, [step], missing=missing)
        assert_close_params(our_params, their_params, f"step {step}:", slack=slack(theirs))
        if then is not None:
            then(step)
    assert_close_state(ours, theirs, loaded_by_torch=loaded_by_torch)


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in the state, with a name."""
    for i, kept in enumerate(optimizer.state.values()):
        for key, value in kept.items():
            if isinstance(value, torch.Tensor):
                yield f"{key} of {i}", value


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A deep copy of all that a step may change: parameters, gradients, state, groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": [p.detach().clone() for p in params],
        "grads": [None if p.grad is None else p.grad.detach().clone() for p in params],
        "state": {
            i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
            for i, p in enumerate(params)
            if p in optimizer.state
        },
        "groups": [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            | {"identities": [id(p) for p in group["params"]]}
            for group in optimizer.param_groups
        ],
    }
