import pytest
import torch
from monai.networks.nets import BasicUNet

from ssl_core.networks import build
from ssl_core.networks.registry import architecture
from ssl_core.networks.weights import WeightsError, compare, encoder_state, load_exact
from tests.kit.networks import SMALL


def net(seed: int) -> BasicUNet:
    torch.manual_seed(seed)
    return BasicUNet(features=(4, 4, 8, 8, 8, 4))


def test_weights_that_match_are_copied_in_full() -> None:
    source, target = net(0), net(1)
    report = load_exact(target, source.state_dict())
    assert report.complete
    assert len(report.matched) == len(source.state_dict())
    assert all(torch.equal(target.state_dict()[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "empty"])
def test_weights_that_do_not_match_are_refused(fault: str) -> None:
    state = dict(net(0).state_dict())
    name = "down_1.convs.conv_0.conv.weight"
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        name = "module.conv_0.weight"
        state[name] = torch.zeros(1)
    elif fault == "shape":
        state[name] = state[name][:, :1]
    else:
        state = {}
    target = net(1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(WeightsError, match="missing|unexpected|shape") as error:
        load_exact(target, state)
    assert fault == "empty" or name in str(error.value)
    assert all(torch.equal(target.state_dict()[k], v) for k, v in before.items())


def test_a_part_loads_when_all_of_the_part_is_there_and_nothing_else() -> None:
    backbone = build("basic_unet", features=(4, 4, 8, 8, 8, 4))
    state, keys = encoder_state(backbone), backbone.encoder_keys()
    assert load_exact(net(1), state, keys).complete
    with pytest.raises(WeightsError, match="unexpected"):
        load_exact(net(1), dict(backbone.net.state_dict()), keys)
    with pytest.raises(WeightsError, match="missing"):
        load_exact(net(1), state)


def test_the_report_counts_every_kind() -> None:
    state = dict(net(0).state_dict())
    state["conv_0.conv_0.conv.bias"] = torch.zeros(9)
    state["other"] = torch.zeros(1)
    del state["final_conv.bias"]
    report = compare(net(0), state)
    assert (report.missing, report.unexpected) == (("final_conv.bias",), ("other",))
    assert report.mismatched == (("conv_0.conv_0.conv.bias", (4,), (9,)),)
    assert len(report.matched) == len(net(0).state_dict()) - 2


@pytest.mark.parametrize("name", sorted(SMALL))
def test_encoders_load_into_the_stock_class_completely(name: str) -> None:
    backbone = build(name, **SMALL[name])
    stock = architecture(name).make(**SMALL[name])
    load_exact(stock, encoder_state(backbone), backbone.encoder_keys())
    wanted = backbone.net.state_dict()
    assert all(torch.equal(stock.state_dict()[k], wanted[k]) for k in backbone.encoder_keys())


def test_values_take_the_networks_type() -> None:
    target = net(1).double()
    load_exact(target, net(0).state_dict())
    assert target.state_dict()["final_conv.bias"].dtype == torch.float64
