"""Every family of models in tests/families: M2PT works on it, or refuses it with a reason."""

import functools

import pytest
from families import FAMILIES, checks
from families.spec import CHECKS, make_model

from peft_m2pt import M2PTConfig, UnsupportedModelError
from peft_m2pt.anatomy import find_sites
from peft_m2pt.interaction import find_connector


KNOWN = [family for family in FAMILIES if family.is_known]
KINDS = ("visual", "textual")


@functools.lru_cache(maxsize=1)
def tuned(family):
    return checks.Tuned(family)


def cases() -> list:
    """Check by check within a family, so that its models are made once."""
    found = []
    for family in KNOWN:
        if len(family.refused) == len(KINDS):
            continue
        for check in CHECKS:
            if check not in family.without and (check != "generation" or family.generates):
                found.append(pytest.param(family, check, id=f"{family.name}-{check}"))
    return found


@pytest.mark.parametrize("family, check", cases())
def test_family(family, check):
    getattr(checks, f"check_{check}")(tuned(family))


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_what_is_refused(family):
    model = make_model(family, "eager" if "attention" in family.without else "sdpa")
    names = [name for name, _ in model.named_modules()]
    for kind in KINDS:
        other = next(other for other in KINDS if other != kind)
        config = M2PTConfig(**{f"num_{other}_tokens": 0}, num_interaction_tokens=0, tune_connector=False)
        if kind not in family.refused:
            assert find_sites(model, config)
            continue
        with pytest.raises(UnsupportedModelError, match=family.refused[kind]) as error:
            find_sites(model, config)
        assert f"num_{kind}_tokens=0" in str(error.value)
    if not family.refused:
        connector = find_connector(model, M2PTConfig()) if family.has_connector else None
        rows_per_token = None if connector is None else connector.rows_per_token
        assert rows_per_token == (family.connector if isinstance(family.connector, int) else None)
    assert names == [name for name, _ in model.named_modules()]
