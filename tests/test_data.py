"""Data sets: decoded once, split without overlap, batched exactly, and clear when something is missing."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.data import (
    NOTHING,
    Augmentation,
    Batches,
    Dataset,
    augment,
    caching,
    decoding,
    digits,
    hold_out,
    image_folder,
    load_data,
    sources,
)
from secateur.data.sets import Decoded, make_splits, pixel_statistics
from secateur.data.text import sst2
from secateur.errors import DataError, InputError, UnknownNameError
from secateur.files import replacing, write_bytes

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SECATEUR_DATA", raising=False)


def toy(count: int = 40, classes: int = 4, side: int = 6, channels: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    mean, std = pixel_statistics(images)
    return Dataset(images, labels, tuple("abcdefgh"[:classes]), mean, std, "toy")


def picture(seed: int, side: int = 32, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "png")
    return file.getvalue()


def write_parquet(file: Path, rows: list[bytes], labels: list[int], *, label: str = "label", classes: int = 3) -> None:
    import datasets

    names = [f"class{number}" for number in range(classes)]
    features = datasets.Features({"img": datasets.Image(), label: datasets.ClassLabel(names=names)})
    cells = [{"bytes": row, "path": None} for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"img": cells, label: labels}, features=features).to_parquet(file)


@pytest.fixture
def cifar_like(tmp_path: Path) -> Path:
    """A folder laid out like CIFAR-10: two training files and one test file, 24 + 6 images in 3 classes."""
    root = tmp_path / "data"
    for number in range(2):
        rows = [picture(12 * number + row) for row in range(12)]
        write_parquet(root / "cifar10" / f"train-{number:05}-of-00002.parquet", rows, [row % 3 for row in range(12)])
    write_parquet(
        root / "cifar10" / "test-00000-of-00001.parquet", [picture(100 + row) for row in range(6)], [0, 1, 2] * 2
    )
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ and val/ with two classes of pictures of different sizes, one of them grey."""
    for part, count in (("train", 10), ("val", 3)):
        for kind in ("cat", "dog"):
            place = tmp_path / "pets" / part / kind
            place.mkdir(parents=True)
            for number in range(count):
                content = picture(number, side=20 + number, mode="L" if number == 0 else "RGB")
                (place / f"{number}.png").write_bytes(content)
    return tmp_path / "pets"


# Splits


@given(st.integers(20, 200), st.integers(1, 5), st.floats(0.15, 0.85), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_hold_out_divides_the_samples_class_by_class(count: int, classes: int, fraction: float, seed: int) -> None:
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    labels = torch.arange(count) % classes
    whole = Dataset(images, labels, tuple("abcde"[:classes]), (0.5,), (1.0,), "numbered")
    rest, held = hold_out(whole, fraction, seed)
    together = torch.cat([rest.images, held.images]).flatten()
    assert torch.equal(together.sort().values, images.flatten())
    for label in range(classes):
        assert int((held.labels == label).sum()) == round(fraction * int((labels == label).sum()))
    assert torch.equal(held.labels, held.images.flatten().long() % classes)


def test_hold_out_follows_the_seed() -> None:
    assert hold_out(toy(), 0.25, 1)[1].same_as(hold_out(toy(), 0.25, 1)[1])
    assert not hold_out(toy(), 0.25, 1)[1].same_as(hold_out(toy(), 0.25, 2)[1])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10])
def test_hold_out_refuses_fractions_outside_zero_and_one(fraction: float) -> None:
    with pytest.raises(InputError, match="For a tenth, pass"):
        hold_out(toy(), fraction, 0)


def test_hold_out_refuses_too_few_images() -> None:
    with pytest.raises(DataError, match="too few"):
        hold_out(toy(4), 0.1, 0)


def test_seeds_share_the_test_set_and_differ_in_the_validation_set() -> None:
    one, two = digits(seed=0), digits(seed=1)
    assert one.test.same_as(two.test)
    assert not one.validation.same_as(two.validation)
    assert len(one.train) + len(one.validation) + len(one.test) == 1797
    assert one.train.image_shape == (1, 8, 8)
    assert one.train.classes == tuple("0123456789")
    assert sorted(one.train.images.unique().tolist())[-1] == 255


def test_statistics_are_those_of_the_training_images_alone() -> None:
    splits = digits()
    pixels = splits.train.images.double() / 255
    assert splits.train.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert splits.train.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-12)
    assert splits.test.mean == splits.validation.mean == splits.train.mean
    normal = splits.train.normalise(splits.train.images)
    assert abs(normal.mean()) < 1e-5
    assert normal.std() == pytest.approx(1, abs=1e-3)


def test_a_source_that_brings_its_own_parts_keeps_them() -> None:
    parts = {
        part: (toy(size).images, toy(size).labels) for part, size in (("train", 40), ("validation", 12), ("test", 16))
    }
    splits = make_splits(Decoded(parts, tuple("abcd")), "own", validation=0.1, seed=0, augmentation=NOTHING)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 12, 16)
    assert repr(splits) == "Splits(own: train + validation + test = 40 + 12 + 16)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(40, 3, 6, 6)}, "uint8"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, r"int64 \(40,\)"),
        ({"labels": torch.full((40,), 9)}, "labels must lie"),
        ({"std": (1.0,)}, "one value per image channel"),
        (
            {"images": torch.zeros(0, 3, 6, 6, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)},
            "no image",
        ),
    ],
)
def test_a_malformed_data_set_cannot_be_made(change: dict, message: str) -> None:
    good = toy()
    fields = {name: getattr(good, name) for name in ("images", "labels", "classes", "mean", "std", "name")}
    with pytest.raises(DataError, match=message):
        Dataset(**{**fields, **change})


# Augmentation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_doing_nothing_is_the_identity() -> None:
    images = toy().images
    assert torch.equal(augment(images, seeded(), NOTHING), images)


@given(st.integers(0, 4), st.booleans(), st.sampled_from(["reflect", "zero"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_image_is_a_window_of_the_padded_original(crop: int, flip: bool, padding: str, seed: int) -> None:
    images = toy(8, side=7).images
    changed = augment(images, seeded(seed), Augmentation(crop, flip, padding=padding))
    assert changed.dtype == torch.uint8
    for before, after in zip(images.float(), changed.float(), strict=True):
        pad = (crop,) * 4
        mode = {"mode": "reflect"} if padding == "reflect" else {}
        padded = torch.nn.functional.pad(before[None], pad, **mode)[0] if crop else before
        windows = [
            padded[:, top : top + 7, left : left + 7] for top in range(2 * crop + 1) for left in range(2 * crop + 1)
        ]
        candidates = windows + ([window.flip(2) for window in windows] if flip else [])
        assert any(torch.equal(after, candidate) for candidate in candidates)


def test_augmentation_is_random_per_image_and_follows_the_generator() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    once = augment(images, seeded(3))
    assert torch.equal(once, augment(images, seeded(3)))
    assert not torch.equal(once, augment(images, seeded(4)))
    assert len({tuple(image.flatten().tolist()) for image in once}) > 80  # of 162 positions and mirrorings


def test_about_half_of_the_images_are_flipped() -> None:
    images = toy(1).images.expand(1000, 3, 6, 6)
    flipped = augment(images, seeded(), Augmentation(crop=0)).ne(images).flatten(1).any(1)
    assert 440 < int(flipped.sum()) < 560


def largest(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """The largest number that torch.rand could draw, nearly."""
    return torch.ones(*shape)


def test_the_largest_turn_is_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    images = toy(3).images
    monkeypatch.setattr(torch, "rand", largest)
    turned = augment(images, seeded(), Augmentation(crop=0, flip=False, rotate=90))
    assert torch.equal(turned, images.rot90(1, (2, 3)))


def test_small_turns_change_little_and_differ() -> None:
    smooth = torch.linspace(0, 255, 32).round().to(torch.uint8).expand(4, 3, 32, 32)
    moved = augment(smooth, seeded(), Augmentation(crop=0, flip=False, rotate=5)).float() - smooth.float()
    assert 0 < moved.abs().mean() < 12
    assert len({float(image.abs().sum()) for image in moved}) == 4


def test_a_turn_is_rigid_on_images_that_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    # A quarter turn of a wide image shows its centre square, turned.
    images = torch.randint(256, (2, 1, 4, 12), generator=seeded(), dtype=torch.uint8)
    monkeypatch.setattr(torch, "rand", largest)
    turned = augment(images, seeded(), Augmentation(crop=0, flip=False, rotate=90, padding="zero"))
    assert torch.equal(turned[..., 4:8], images[..., 4:8].rot90(1, (2, 3)))
    assert not turned[..., :4].any()


@pytest.mark.parametrize("wrong", [{"crop": -1}, {"rotate": -5.0}, {"padding": "edge"}])
def test_impossible_augmentations_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Augmentation(**wrong)


def test_reflecting_more_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="lower crop"):
        augment(toy(side=4).images, seeded(), Augmentation(crop=4))


# Batches


def test_an_epoch_holds_every_sample_once_and_repeats_exactly() -> None:
    data = toy(41)
    batches = Batches(data, 8, seed=5)
    batches.set_epoch(2)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 6
    assert [len(y) for _, y in first] == [8, 8, 8, 8, 8, 1]
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    seen = torch.cat([x for x, _ in first]).flatten(1).sum(1).sort().values
    assert torch.allclose(seen, data.normalise(data.images).flatten(1).sum(1).sort().values, atol=1e-4)


def test_order_depends_on_seed_and_epoch_and_they_do_not_alias() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = Batches(Dataset(*numbered, ("a",), (0.5,), (1.0,), "numbered"), 64, seed=seed)
        batches.set_epoch(epoch)
        ((x, _),) = batches
        return tuple(((x + 0.5) * 255).round().int().flatten().tolist())

    numbered = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64)
    orders = [order(seed, epoch) for seed in range(-1, 5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(found) == list(range(64)) for found in orders)


def test_without_shuffling_or_augmentation_batches_are_the_data_in_order() -> None:
    data = toy(10)
    x, y = (torch.cat(parts) for parts in zip(*Batches(data, 3, shuffle=False), strict=True))
    assert torch.equal(x, data.normalise(data.images))
    assert torch.equal(y, data.labels)
    assert x.dtype == torch.float32


def test_drop_last_drops_only_a_rest() -> None:
    assert [len(y) for _, y in Batches(toy(41), 8, drop_last=True)] == [8] * 5
    assert len(Batches(toy(40), 8, drop_last=True)) == len(Batches(toy(40), 8)) == 5


def test_batches_that_would_be_empty_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        Batches(toy(), 0)
    with pytest.raises(InputError, match="keep the last"):
        Batches(toy(40), 64, drop_last=True)


def test_values_print_themselves() -> None:
    data = toy()
    assert repr(data) == "Dataset(toy: 40 images 3x6x6, 4 classes)"
    assert repr(Batches(data, 8, seed=3)) == f"Batches(5 of 8 from {data!r}, seed 3, epoch 0)"


# Sources


def test_parquet_files_are_decoded_pixel_for_pixel(cifar_like: Path) -> None:
    splits = load_data("cifar10", cifar_like, validation=0.25)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 6)
    assert splits.train.classes == ("class0", "class1", "class2")
    expected = torch.from_numpy(np.asarray(Image.open(io.BytesIO(picture(104)))).copy()).permute(2, 0, 1)
    assert torch.equal(splits.test.images[4], expected)
    assert splits.test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_environment_names_the_folder(cifar_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(cifar_like))
    assert len(load_data("cifar10", validation=0.25).test) == 6


def test_cifar100_reads_its_fine_labels(tmp_path: Path) -> None:
    for part in ("train", "test"):
        file = tmp_path / "cifar100" / f"{part}-00000-of-00001.parquet"
        write_parquet(file, [picture(row) for row in range(9)], [0, 1, 2] * 3, label="fine_label")
    assert load_data("cifar100", tmp_path, validation=0.34).test.labels.tolist() == [0, 1, 2] * 3


def test_a_second_load_decodes_nothing(cifar_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_data("cifar10", cifar_like, validation=0.25)
    monkeypatch.setattr(sources, "decode_parquet", None)  # calling it would fail
    assert load_data("cifar10", cifar_like, validation=0.25).train.same_as(first.train)


def test_a_changed_source_is_decoded_anew(cifar_like: Path) -> None:
    before = load_data("cifar10", cifar_like, validation=0.25)
    write_parquet(cifar_like / "cifar10" / "test-00000-of-00001.parquet", [picture(7)] * 3, [2, 1, 0])
    after = load_data("cifar10", cifar_like, validation=0.25)
    assert after.test.labels.tolist() == [2, 1, 0]
    assert after.train.same_as(before.train)


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_a_damaged_cache_is_rebuilt(cifar_like: Path, tmp_path: Path, damage: str) -> None:
    first = load_data("cifar10", cifar_like, validation=0.25)
    (file,) = (tmp_path / "cache" / "data").iterdir()
    whole = file.read_bytes()
    broken = {"truncate": whole[:-100], "empty": b"", "flip": whole[:-1] + bytes([whole[-1] ^ 1])}[damage]
    file.write_bytes(broken)
    assert load_data("cifar10", cifar_like, validation=0.25).train.same_as(first.train)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_warns_and_goes_on(
    cifar_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "write_bytes", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(load_data("cifar10", cifar_like, validation=0.25).test) == 6


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caching.cache_folder(tmp_path) == tmp_path
    assert caching.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SECATEUR_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caching.cache_folder() == tmp_path / "xdg" / "secateur"
    monkeypatch.setattr("sys.platform", "darwin")
    assert caching.cache_folder() == Path.home() / "Library" / "Caches" / "secateur"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert caching.cache_folder() == tmp_path / "local" / "secateur"


def test_image_folders_are_scaled_cropped_and_split(folders: Path) -> None:
    splits = image_folder(folders, size=16, validation=0.2)
    assert splits.train.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 6)
    assert splits.train.image_shape == (3, 16, 16)
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    grey = splits.test.images[0]
    assert torch.equal(grey[0], grey[1])
    assert load_data("imagefolder", folders, size=16, validation=0.2).train.same_as(splits.train)


def test_a_single_folder_of_classes_loses_a_fifth_for_the_test(folders: Path) -> None:
    splits = image_folder(folders / "train", size=16, validation=0.25)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 4, 4)


def test_a_class_that_a_part_lacks_keeps_its_place(folders: Path) -> None:
    for file in (folders / "val" / "cat").iterdir():
        file.unlink()
    splits = image_folder(folders, size=16)
    assert splits.train.classes == ("cat", "dog")
    assert splits.test.labels.tolist() == [1, 1, 1]


def test_test_and_validation_folders_keep_their_roles(folders: Path) -> None:
    (folders / "test" / "cat").mkdir(parents=True)
    (folders / "test" / "dog").mkdir()
    for kind in ("cat", "dog"):
        (folders / "test" / kind / "one.png").write_bytes(picture(3))
    splits = image_folder(folders, size=16)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 6, 2)


# What is missing or wrong


def test_an_unknown_data_set_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cifar10'"):
        load_data("cifar-10")


def test_a_missing_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar10/train-\*\.parquet.*no such folder.*--data-dir"):
        load_data("cifar10", tmp_path)
    with pytest.raises(DataError, match="no folder"):
        image_folder(tmp_path / "nowhere", size=8)
    with pytest.raises(DataError, match="needs the folder"):
        load_data("imagefolder")


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataError, match="no such files"):
        load_data("cifar10", tmp_path)
    with pytest.raises(DataError, match="no images below"):
        image_folder(tmp_path, size=8)


def test_a_missing_test_part_is_named(cifar_like: Path) -> None:
    (cifar_like / "cifar10" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"test-\*\.parquet"):
        load_data("cifar10", cifar_like)


def test_a_damaged_parquet_file_is_named(cifar_like: Path) -> None:
    (cifar_like / "cifar10" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cifar10: the data could not be read"):
        load_data("cifar10", cifar_like)


def test_a_wrong_column_lists_those_there_are(tmp_path: Path) -> None:
    for part in ("train", "test"):
        file = tmp_path / "cifar10" / f"{part}-00000-of-00001.parquet"
        write_parquet(file, [picture(0)], [0], label="kind")
    with pytest.raises(DataError, match="no column 'label'; the columns are img, kind"):
        load_data("cifar10", tmp_path)


def test_an_image_that_is_none_is_named(cifar_like: Path, folders: Path) -> None:
    write_parquet(cifar_like / "cifar10" / "test-00000-of-00001.parquet", [picture(0), b"no image"], [0, 1])
    with pytest.raises(DataError, match="cifar10/test, row 1"):
        load_data("cifar10", cifar_like)
    (folders / "train" / "dog" / "5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/5\.png"):
        image_folder(folders, size=8)


def test_images_of_different_sizes_are_named(cifar_like: Path) -> None:
    rows = [picture(0), picture(1, side=16)]
    write_parquet(cifar_like / "cifar10" / "test-00000-of-00001.parquet", rows, [0, 1])
    with pytest.raises(DataError, match="row 1: an image of 16x16 among images of 32x32"):
        load_data("cifar10", cifar_like)


def test_parts_with_different_classes_are_refused(cifar_like: Path) -> None:
    write_parquet(cifar_like / "cifar10" / "test-00000-of-00001.parquet", [picture(0)], [0], classes=4)
    with pytest.raises(DataError, match="test part has other classes"):
        load_data("cifar10", cifar_like)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    advice = r"could not be had from the Hub: no route.*SECATEUR_DATA"
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    with pytest.raises(DataError, match=f"sst2: .*{advice}"):
        sst2(None)
    with pytest.raises(DataError, match=advice):
        load_data("cifar10")


def test_what_the_hub_sends_is_decoded(cifar_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    files = {part: sorted(map(str, (cifar_like / "cifar10").glob(f"{part}-*"))) for part in ("train", "test")}
    sent = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cifar_like / "scratch"))
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or sent)
    splits = load_data("cifar10", validation=0.25)
    assert asked == ["uoft-cs/cifar10"]
    assert len(splits.test) == 6


# The real files, where they are


REAL = os.environ.get("SECATEUR_DATA", "")


@pytest.mark.slow
@pytest.mark.skipif(not (Path(REAL) / "cifar10").is_dir(), reason="SECATEUR_DATA names no folder with cifar10/ in it")
def test_the_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", REAL)
    splits = load_data("cifar10")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45_000, 5_000, 10_000)
    assert splits.validation.labels.bincount().tolist() == [500] * 10
    assert splits.train.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.002)  # published for the 50,000


# Files


def test_replacing_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    write_bytes(target, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"


def test_replaced_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_decoding_leaves_the_progress_bars_as_they_were() -> None:
    import datasets

    datasets.enable_progress_bars()
    with decoding._quiet(datasets):
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
