import pytest

from benchmarks import mesh, plan
from seqfair_jax.config import default_config, resolve


def make_config(**sizes):
    config = default_config()
    config.model.update({"dim": 8, "ff_dim": 8, "num_blocks": 1, "max_len": 14} | sizes)
    return config


def make_plan(shape, loss="full", *, config=None, items=1000, **sizes):
    config = resolve(config or make_config())
    return plan.Plan(config, shape, loss, items=items, **({"rows": 4000, "users": 200} | sizes))


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_the_arguments_are_those_of_the_compiled_program(loss):
    config = make_config()
    config.train.loss, config.train.negatives = loss, 64
    config = resolve(config)
    program = mesh.compiled_step(config, (1, 1, 1), items=1000, users=200, tokens=128)
    counted = make_plan((1, 1, 1), loss, config=config).arguments()
    # Beside them are the ids of the batch's users, and a few numbers.
    rest = program.memory_analysis().argument_size_in_bytes - counted
    assert 0 <= rest <= 4 * config.train.batch_size + 64


def test_the_catalogue_axis_divides_the_tables_and_the_data_axis_the_log():
    one = make_plan((1, 1, 1), items=10**6)
    tables, rest = 3 * 4 * 8 * 10**6, one.memory()["parameters, Adam"] - 3 * 4 * 8 * 10**6
    assert make_plan((1, 1, 8), items=10**6).memory()["parameters, Adam"] == tables // 8 + rest
    assert make_plan((1, 8, 1), items=10**6).memory()["parameters, Adam"] == tables + rest
    assert make_plan((1, 8, 1)).memory()["log of the validation"] == 4 * 4000 // 8
    assert one.data_bytes() == one.catalogue_bytes() == one.log_bytes() == 0
    # The gradient of all parameters. The devices of this mesh have a fourth of the table each.
    transformer = make_plan((1, 8, 1), items=10**6).data_bytes() - tables // 3
    assert 0 < transformer < rest / 3
    assert make_plan((1, 2, 4), items=10**6).data_bytes() == tables // 3 // 4 + transformer


def test_the_average_of_the_parameters_is_counted():
    config = make_config()
    config.train.average_decay = 0.9
    plain, averaged = make_plan((1, 1, 1)), make_plan((1, 1, 1), config=config)
    key = "parameters, Adam"
    assert averaged.memory()[key] - plain.memory()[key] == plain.memory()["best epochs"] // 2


def test_item_biases_are_counted():
    config = make_config(item_bias=True)
    key, bytes_of_biases = "best epochs", 2 * 4 * 1000
    plain, biased = make_plan((1, 1, 1)), make_plan((1, 1, 1), config=config)
    assert biased.memory()[key] - plain.memory()[key] == bytes_of_biases
    for loss, more in (("full", 4 * 2560 * 8), ("sampled", 4 * (2560 + 4096))):
        plain, biased = (
            make_plan((1, 1, 4), loss, config=config, targets=2560)
            for config in (None, make_config(item_bias=True))
        )
        assert biased.catalogue_bytes() - plain.catalogue_bytes() == more


def test_operations_of_a_device():
    useful, own = make_plan((1, 1, 1)).flop()
    assert own == pytest.approx(useful)  # not in chunks
    scores = 128 * 20 * 3 * 2 * 1000 * 8  # targets, three products, items, width
    # The scores are divided by both axes, the rest by the data axis alone.
    assert make_plan((1, 2, 4)).flop()[1] == pytest.approx(scores / 8 + (useful - scores) / 2)
    useful, own = make_plan((1, 1, 1), items=10**6).flop()
    assert own / useful == pytest.approx(4 / 3, rel=1e-3)  # in chunks, four products
    # A target and its negatives, on every device of the catalogue axis.
    sampled = make_plan((1, 1, 4), "sampled", targets=2560).flop()
    assert sampled[1] == pytest.approx(sampled[0])


def test_the_rate_of_an_axis_is_that_of_its_slowest_links():
    rate = make_plan((1, 1, 1))._rate
    assert rate(8, 1) == rate(2, 4) == plan.NVLINK  # inside a node
    assert rate(64, 1) == 8 * plan.NETWORK  # every device of a node has a card
    assert rate(8, 8) == plan.NETWORK  # one device of each node
    assert rate(32, 2) == 4 * plan.NETWORK


def test_efficiency_is_the_share_of_useful_arithmetic():
    found = make_plan((1, 1, 1))
    seconds = found.seconds()
    assert seconds["links"] == 0
    expected = seconds["arithmetic"] / (seconds["arithmetic"] + seconds["tables"])
    assert found.efficiency() == pytest.approx(expected)
