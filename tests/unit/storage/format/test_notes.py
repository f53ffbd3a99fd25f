"""Notes of volumes by kind: counted, with names, and with the words that all of them share."""

from storage.format.notes import note_kinds


def test_notes_that_differ_in_numbers_are_one_kind() -> None:
    kinds = note_kinds(
        [
            ("a", ["scaled by 0.5 with offset -3", "1 mm assumed", "EchoTime=4.2"]),
            ("b", ["scaled by 1e-05 with offset 1,024", "1 mm assumed", "image_sha256=0123"]),
            ("c", ["same content as a", "label values too small to be left after resampling: 7, 12"]),
            ("d", ["same content as b-2", "label values too small to be left after resampling: 3"]),
            ("e", ["1 mm assumed", "1 mm assumed"]),
        ]
    )
    assert [(kind.note, kind.volumes) for kind in kinds] == [
        ("1 mm assumed", 3),
        ("label values too small to be left after resampling: N", 2),
        ("same content as N", 2),
        ("scaled by N with offset N", 2),
    ]
    assert str(kinds[0]) == "3 x 1 mm assumed: a, b, e"
    assert str(kinds[3]) == "2 x scaled by N with offset N: a (scaled by 0.5 with offset -3), b"


def test_more_volumes_than_examples_are_counted() -> None:
    (kind,) = note_kinds((f"v{i}", ["first of 3 volumes"]) for i in range(1000))
    assert str(kind) == "1,000 x first of 3 volumes: v0, v1, v2, ..."
    assert note_kinds([("a", []), ("b", ["SliceThickness=5"])]) == ()


def test_the_order_of_volumes_with_one_kind_does_not_change_its_words() -> None:
    volumes = [("a", ["first of 3 volumes"]), ("b", ["first of 4 volumes"]), ("c", ["first of 3 volumes"])]
    assert {kind.note for order in (volumes, volumes[::-1]) for kind in note_kinds(order)} == {"first of N volumes"}
