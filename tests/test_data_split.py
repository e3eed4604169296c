"""What is held out: always the same, about as much as was asked, never nothing."""

from llmlab.data.split import by_name, place, takes


def test_a_place_depends_on_the_name_alone():
    assert place("json.dumps") == 0x3432BFB435338BDF / 2**64
    assert 0.45 < sum(place(str(i)) for i in range(2000)) / 2000 < 0.55


def test_every_item_is_on_one_side():
    items = [f"item {i}" for i in range(500)]
    names = {item: item for item in items}
    train, held_out = (by_name(items, names, 0.2, side) for side in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(by_name(items, names, 0.2, "all")) == sorted(items)
    assert 70 <= len(held_out) <= 130
    assert len(by_name(items[:3], names, 1e-9, "held_out")) == 1


def test_a_side_takes_its_own():
    assert [takes(side, True) for side in ("train", "held_out", "all")] == [False, True, True]
    assert [takes(side, False) for side in ("train", "held_out", "all")] == [True, False, True]
