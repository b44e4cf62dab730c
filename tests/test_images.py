"""From image files to batches: pixels, crops, workers, and files that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data import images as decoding


def photo(tmp_path, name="photo.jpg", mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = str(tmp_path / name)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def split_of(*files, name="val", labels=None):
    labels = [0] * len(files) if labels is None else labels
    return common.Split(name, "", [str(file) for file in files], torch.tensor(labels))


PLAIN = common.eval_transform(16, (0.0,) * 3, (1.0,) * 3)


def loaded(split, order, transform=PLAIN, **settings):
    config = common.Run(device="cpu", **settings)
    return list(common.load_images(split, transform, order, config, torch.device("cpu")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(workers, tmp_path):
    good, bad = photo(tmp_path), tmp_path / "bad.jpg"
    bad.write_bytes((tmp_path / "photo.jpg").read_bytes()[:1500])
    with pytest.raises(common.InputError, match=r"^\S*bad\.jpg cannot be read.*--skip-bad-images"):
        loaded(split_of(bad, good), [[(0, 0), (1, 0)]], workers=workers)


def test_skipped_images_are_named_on_every_run_and_decoded_once(tmp_path, monkeypatch, capsys):
    files, tried = [photo(tmp_path, f"{i}.jpg") for i in range(4)], []
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[:1500])
    decode = common.unreadable
    monkeypatch.setattr(common, "unreadable", lambda x: tried.append(len(x)) or decode(x))

    def left(labels=(0, 0, 1, 1)):
        """Indices of the images of train that stay."""
        sets = [split_of(*files, name=name, labels=list(labels)) for name in ("train", "test")]
        data = common.Data("folder", ["a", "b"], ["{}"], sets[0], sets[1], sets[1], [], [])
        common.leave_out_unreadable(common.Run(out=str(tmp_path / "out")), data)
        assert data.test.images == data.train.images
        return [files.index(path) for path in data.train.images]

    for again in (False, True):
        tried.clear()
        assert left() == [0, 2, 3]
        assert tried == ([1, 1] if again else [4, 1, 4, 1])
        named = f"train: 1 of 4 images are unreadable and were left out: {files[1]}"
        assert named in capsys.readouterr().out
    with pytest.raises(common.InputError, match="no image of this class can be read; restore"):
        left([0, 1, 0, 0])
    capsys.readouterr()
    (tmp_path / "1.jpg").write_bytes(whole)
    assert left() == [0, 1, 2, 3] and capsys.readouterr().out == ""


def test_a_bug_in_the_transform_is_not_blamed_on_the_file(tmp_path):
    def broken(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.Images(split_of(photo(tmp_path)), broken)[0, 0]


@pytest.mark.parametrize(
    "name, mode", [("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "LA"), ("a.png", "P")]
)
def test_other_colour_modes_become_rgb(tmp_path, name, mode):
    path = photo(tmp_path, name, mode)
    assert Image.open(path).mode == mode
    want = np.asarray(Image.open(path).convert("RGB"))
    assert want.shape == (48, 64, 3) and np.array_equal(decoding.read_rgb(path), want)


def test_16_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    pixels = np.asarray(decoding.read_rgb(str(tmp_path / "deep.png")))
    assert pixels[0, :, 1].tolist() == [0, 100, 255]


def test_eval_transform_is_the_one_of_open_clip_and_keeps_pixels_of_the_right_size(tmp_path):
    from open_clip.transform import image_transform

    image, mean, std = Image.open(photo(tmp_path)), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    theirs = image_transform(40, is_train=False, mean=mean, std=std)(image)
    assert torch.equal(common.eval_transform(40, mean, std)(image), theirs)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(noise).permute(2, 0, 1) / 255
    assert torch.equal(PLAIN(Image.fromarray(noise)), pixels)


def test_train_transform_crops_little_and_never_mirrors():
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    transform = common.train_transform(32, (0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(0)
    for _ in range(50):
        crop = transform(Image.fromarray(ramp))
        assert crop.shape == (3, 32, 32)
        assert crop[0, 0, -1] - crop[0, 0, 0] > 0.75  # a mirrored one would fall


def test_a_random_crop_depends_on_the_seed_of_its_item_only(tmp_path):
    transform = common.train_transform(16, (0.0,) * 3, (1.0,) * 3)
    images = common.Images(split_of(photo(tmp_path)), transform)
    torch.manual_seed(0)
    first, state = images[0, 5][0], torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(images[0, 5][0], first)
    assert not torch.equal(images[0, 6][0], first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the outer generator


def test_batches_are_what_the_transform_gives_with_any_number_of_workers(tmp_path):
    files = [photo(tmp_path, f"{i}.png") for i in range(3)]
    split, order = split_of(*files, labels=[5, 3, 7]), [[(0, 3), (1, 4)], [(2, 5)]]
    alone = loaded(split, order, workers=0)
    assert torch.equal(torch.cat([b[0] for b in alone])[0], PLAIN(Image.open(files[0])))
    crops = common.train_transform(16, (0.5,) * 3, (0.5,) * 3)
    found = (loaded(split, order, crops, workers=workers) for workers in (0, 2))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.cat([labels for _, labels in alone]).tolist() == [5, 3, 7]


def test_workers_are_started_where_a_gpu_waits_for_files_and_as_the_system_can(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    pixels = common.Split("s", "", np.zeros((4, 8, 8), np.uint8), torch.zeros(4).long())
    assert decoding.worker_count(split_of("a.jpg"), cpu) == 0
    assert decoding.worker_count(pixels, gpu) == 0
    assert decoding.worker_count(split_of("a.jpg"), gpu) >= 1
    monkeypatch.setattr(decoding.tempfile, "gettempdir", lambda: "/" + "x" * 90)
    with pytest.raises(common.InputError, match="TMPDIR is too long .*set TMPDIR=/tmp, or pass"):
        decoding.worker_context()
    windows = torch.multiprocessing
    monkeypatch.setattr(windows, "get_all_start_methods", lambda: ["spawn"])
    assert decoding.worker_context().get_start_method() == "spawn"


def test_arrays_are_read_like_files_and_the_border_of_objectnet_is_cut_off_first():
    grey = np.zeros((1, 12, 10), np.uint8)
    grey[0, 2:-2, 2:-2] = np.arange(48).reshape(8, 6)
    split = common.Split("o", "", grey, torch.tensor([3]), border=2)
    image, label = common.Images(split, np.asarray)[0, 0]
    assert np.array_equal(image[:, :, 1], grey[0, 2:-2, 2:-2]) and label == 3
