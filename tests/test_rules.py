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
