"""The first process of a launcher that tells processes their numbers alone (parallel/distributed.py)."""

import pytest

from parallel.distributed import ALONE, join


@pytest.mark.parametrize(("environment", "message"), [
    ({"PMIX_RANK": "0"}, "PMIX_RANK is 0 and nothing says how many processes a PMIx launcher started"),
    ({"PMI_ID": "0", "WORLD_SIZE": ""}, "PMI_ID is 0 and nothing says how many processes mpiexec started"),
    ({"ALPS_APP_PE": "0"}, "ALPS_APP_PE is 0 and nothing says how many processes aprun started"),
    ({"PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"PMIX_RANK": ""}, None),
    ({}, None),
])  # fmt: skip
def test_a_first_process_that_cannot_know_of_others_is_warned(environment, message, capsys):
    assert join(environment) is ALONE
    expected = f"warning: {message}; this one trains alone\n" if message else ""
    assert capsys.readouterr().err == expected
