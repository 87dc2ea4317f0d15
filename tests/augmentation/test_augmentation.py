"""What may be done to a waveform and to log-mel, each against what it is to be."""

import numpy as np
import pytest
from whisper_meft.augmentation import waves
from whisper_meft.augmentation.settings import KINDS, Augmentation, parse_kinds
from whisper_meft.augmentation.spectrograms import spec_augment
from whisper_meft.errors import UserError

RATE = 16_000


def noise_of(samples: int, seed: int = 0, power: float = 1.0) -> np.ndarray:
    return (power**0.5 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def tone(hertz: float, samples: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(samples) / RATE).astype(np.float32)


def power(wave: np.ndarray) -> float:
    return float(np.square(wave, dtype=np.float64).mean())


def band_power(wave: np.ndarray, low: float, high: float) -> float:
    """Of the part of a wave between two frequencies, the ends weighing little: they are cuts."""
    spectrum = np.abs(np.fft.rfft(wave.astype(np.float64) * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)
    return float(spectrum[(hertz >= low) & (hertz < high)].sum() * 2 / len(wave) ** 2)


# --- waveforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("samples", [1, 2, 160, 7919, RATE])
def test_speed_divides_the_length_and_multiplies_the_pitch(factor, samples):
    faster = waves.change_speed(tone(440, samples), factor)
    assert faster.dtype == np.float32 and len(faster) == max(1, int(samples / factor + 1e-6))
    if samples == RATE:
        peak = np.abs(np.fft.rfft(faster)).argmax() * RATE / len(faster)
        assert peak == pytest.approx(440 * factor, abs=RATE / len(faster))
        assert power(faster) == pytest.approx(0.5, rel=0.02)


def test_no_change_of_speed_is_none():
    wave = noise_of(1000)
    assert waves.change_speed(wave, 1.0) is wave


@pytest.mark.parametrize("gain", [-60.0, -10.0, 0.0, 6.0, 60.0])
def test_gain_is_in_db_and_clips_nothing(gain):
    louder = waves.change_gain(tone(300), gain)
    assert 10 * np.log10(power(louder) / power(tone(300))) == pytest.approx(gain, abs=1e-4)
    assert louder.dtype == np.float32


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5, 40.0])
@pytest.mark.parametrize("length", [100, 5000, 3 * RATE])
def test_noise_has_the_snr_that_is_asked_for(snr, length):
    wave, noise = tone(300), noise_of(length, power=37.0)
    noisy = waves.add_noise(wave, noise, snr, RATE)
    added = noisy.astype(np.float64) - wave
    assert 10 * np.log10(power(wave) / power(added)) == pytest.approx(snr, abs=1e-3)
    assert noisy.dtype == np.float32 and len(noisy) == len(wave)
    # Cut, or repeated from its beginning.
    assert np.corrcoef(added, np.resize(noise, len(wave)))[0, 1] > 0.9999


def test_pauses_do_not_make_a_clip_quieter():
    """Half of the clip is a pause at -60 dB: noise is set against the half that sounds."""
    wave = np.concatenate([tone(300), 1e-3 * noise_of(RATE)])
    assert waves.sounding_power(wave, RATE) == pytest.approx(0.5, rel=0.01)
    added = waves.add_noise(wave, noise_of(2 * RATE), 0.0, RATE) - wave
    assert power(added) == pytest.approx(0.5, rel=0.01)
    # A pause of 30 dB below is not one.
    wave = np.concatenate([tone(300), 0.0316 * 2**0.5 * tone(300)])
    assert waves.sounding_power(wave, RATE) == pytest.approx(power(wave), rel=0.01)


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 7919])
def test_sounding_power_of_all_that_sounds_is_the_mean_square(samples):
    wave = noise_of(samples, 3)
    assert waves.sounding_power(wave, RATE) == pytest.approx(power(wave), rel=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_coloured_noise_falls_as_its_exponent_says(exponent):
    noise = waves.coloured_noise(8 * RATE, exponent, RATE, np.random.default_rng(0))
    assert noise.dtype == np.float32 and power(noise) == pytest.approx(1, rel=1e-5)
    octaves = [band_power(noise, hertz, 1.1 * hertz) / hertz for hertz in (250, 500, 1000, 2000, 4000)]
    slope = np.polyfit(np.arange(5), np.log2(octaves), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.15)


@pytest.mark.parametrize("at", [0, 1, 1234])
@pytest.mark.parametrize("height", [1.0, -0.25])
def test_a_room_without_echo_changes_nothing(at, height):
    response = np.zeros(2000, np.float32)
    response[at] = height
    wave = noise_of(5000)
    np.testing.assert_allclose(waves.reverberate(wave, response), wave, atol=1e-5)


def test_a_room_is_a_convolution_at_the_clips_power():
    wave, response = noise_of(3000), noise_of(700, 1) * np.exp(-np.arange(700) / 80)
    response[40] = 9.0
    heard = waves.reverberate(wave, response.astype(np.float32))
    plain = np.convolve(wave.astype(np.float64), response)[40 : 40 + len(wave)]
    assert power(heard) == pytest.approx(power(wave), rel=1e-5)
    np.testing.assert_allclose(heard, plain * (power(wave) / power(plain)) ** 0.5, atol=1e-5)
    assert len(heard) == len(wave) and heard.dtype == np.float32


@pytest.mark.parametrize("mu_law", [False, True])
def test_a_telephone_lets_its_band_through_and_nothing_else(mu_law):
    wave = noise_of(3 * RATE, power=0.01)
    heard = waves.telephone(wave, RATE, mu_law)
    assert heard.dtype == np.float32 and len(heard) == len(wave)
    assert band_power(heard, 330, 3370) == pytest.approx(band_power(wave, 330, 3370), rel=0.02)
    # Above 4 kHz no sample of 8 kHz has anything; of the rest mu-law's steps leave a little.
    assert band_power(heard, 4000, 8000) < 1e-6 * band_power(wave, 4000, 8000)
    least = 1e-3 if mu_law else 1e-6
    assert band_power(heard, 0, 190) < least * band_power(wave, 0, 190)
    assert band_power(heard, 3620, 3900) < least * band_power(wave, 3620, 3900)


@pytest.mark.parametrize("seconds", [1e-4, 0.01, 0.3, 1.7])
def test_a_telephone_keeps_time(seconds):
    samples = max(1, round(seconds * RATE))
    wave = tone(1000, samples) * np.hanning(samples).astype(np.float32)
    heard = waves.telephone(wave, RATE)
    assert len(heard) == samples and np.isfinite(heard).all()
    if seconds >= 0.3:
        np.testing.assert_allclose(heard, wave, atol=0.02)


def test_mu_law_has_255_levels_of_which_most_are_quiet():
    wave = np.linspace(-0.5, 0.5, 100_001).astype(np.float32)
    levels = np.unique(waves._through_mu_law(wave))
    assert len(levels) == 255
    assert levels[-1] == pytest.approx(0.5) and (np.abs(levels) < 0.05).sum() > 128
    # Signal to noise of about 38 dB over 40 dB of level is what companding is for.
    for level in (1.0, 0.1, 0.01):
        tested = np.concatenate([level * tone(440), [1.0]]).astype(np.float32)
        error = waves._through_mu_law(tested)[:-1] - tested[:-1]
        assert 30 < 10 * np.log10(power(tested[:-1]) / power(error)) < 42


CHANGES = {
    "speed": lambda wave: waves.change_speed(wave, 1.1),
    "gain": lambda wave: waves.change_gain(wave, -3.0),
    "noise": lambda wave: waves.add_noise(wave, noise_of(500), 5.0, RATE),
    "silent noise": lambda wave: waves.add_noise(wave, np.zeros(70, np.float32), 5.0, RATE),
    "room": lambda wave: waves.reverberate(wave, noise_of(300)),
    "silent room": lambda wave: waves.reverberate(wave, np.zeros(300, np.float32)),
    "telephone": lambda wave: waves.telephone(wave, RATE),
    "mu-law": lambda wave: waves.telephone(wave, RATE, mu_law=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("samples", [1, 2, 50, 4000])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1.0, 1e10])
def test_silent_short_and_loud_clips_stay_finite(change, samples, level):
    wave = noise_of(samples) * np.float32(level)
    given = wave.copy()
    out = CHANGES[change](wave)
    assert out.dtype == np.float32 and out.ndim == 1 and len(out) and np.isfinite(out).all()
    np.testing.assert_array_equal(wave, given)  # nothing is written into
    if level == 0:
        assert not out.any()


@pytest.mark.parametrize("least", [1, 2, 3, 5, 17, 1000, 12_289, 480_001])
def test_fast_lengths(least):
    size = waves._fast_length(least)
    assert least <= size <= max(least + 1, 1.34 * least)
    while size % 2 == 0:
        size //= 2
    assert size in (1, 3, 5, 9)


# --- SpecAugment ------------------------------------------------------------------------------------------


def runs(row: np.ndarray) -> int:
    """How many stretches of true values there are."""
    return int(np.diff(np.concatenate([[0], row.astype(int), [0]])).clip(min=0).sum())


@pytest.mark.parametrize(("masks", "bins", "longest"), [(1, 10, 30), (2, 27, 100), (3, 5, 0), (2, 0, 7)])
def test_spec_augment_leaves_out_at_most_what_is_asked_for(masks, bins, longest):
    frames, widest, most = 150, 0, 0
    for seed in range(30):
        features = noise_of(80 * 200, seed).reshape(80, 200)
        given = features.copy()
        out = spec_augment(features, frames, masks, bins, longest, np.random.default_rng(seed))
        np.testing.assert_array_equal(features, given)
        np.testing.assert_array_equal(out[:, frames:], features[:, frames:])  # padding stays
        gone = out != features
        bands, stretches = gone[:, :frames].all(1), gone[:, :frames].all(0)
        np.testing.assert_allclose(out[gone], features[:, :frames].mean(dtype=np.float64), atol=1e-6)
        # Nothing is left out but whole bands and whole stretches.
        assert (gone[:, :frames] == (bands[:, None] | stretches[None])).all()
        assert runs(bands) <= masks and bands.sum() <= masks * bins
        assert runs(stretches) <= masks and stretches.sum() <= masks * min(longest, frames // 5)
        widest, most = max(widest, bands.sum()), max(most, stretches.sum())
    assert widest >= 0.5 * masks * bins and most >= 0.5 * masks * min(longest, frames // 5)


@pytest.mark.parametrize("frames", [0, 1, 4])
def test_spec_augment_of_hardly_anything(frames):
    features = noise_of(80 * 4).reshape(80, 4)
    out = spec_augment(features, frames, 2, 27, 100, np.random.default_rng(0))
    assert np.isfinite(out).all() and (out[:, frames:] == features[:, frames:]).all()


# --- settings ---------------------------------------------------------------------------------------------


def test_kinds_are_named_in_any_order_with_spaces_or_commas():
    assert parse_kinds(["spec,noise:0.25", "speed"]) == {"speed": 1.0, "noise": 0.25, "spec": 1.0}
    assert list(parse_kinds(["spec", "gain", "noise", "speed"])) == ["speed", "noise", "gain", "spec"]
    assert parse_kinds([*KINDS]) == KINDS
    assert Augmentation({"spec": 0.5, "speed": 1}).kinds == {"speed": 1.0, "spec": 0.5}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["reverb"], "some of speed, room, noise, telephone, gain, spec, got 'reverb'"),
        (["noise,noise"], "names noise twice"),
        (["noise:"], "probability of noise must be above 0 and at most 1, got ''"),
        (["noise:0"], "got '0'"),
        (["noise:nan"], "got 'nan'"),
        (["noise:1.5"], "got '1.5'"),
        (["noise:often"], "got 'often'"),
        (["speed,"], "got ''"),
        ([], "got nothing"),
    ],
)
def test_kinds_that_cannot_be_used(entries, message):
    with pytest.raises(UserError, match=message):
        parse_kinds(entries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed_factors": []}, "speed_factors must lie between 0.5 and 2"),
        ({"speed_factors": [1.0, 0.2]}, "got 1 0.2"),
        ({"speed_factors": [float("nan")]}, "got nan"),
        ({"noise_snr": [20, 0]}, "noise_snr must be two numbers of dB from -100 to 100, the lower one first"),
        ({"noise_snr": [5]}, "got 5"),
        ({"noise_snr": [0, float("inf")]}, "got 0 inf"),
        ({"gain_db": [-70, 0]}, "gain_db must be two numbers of dB from -60 to 60"),
        ({"gain_db": [0, float("nan")]}, "got 0 nan"),
        ({"spec_masks": 0}, "spec_masks must be an integer of at least 1, got 0"),
        ({"spec_bins": -1}, "spec_bins must be an integer of at least 0, got -1"),
        ({"spec_frames": 2.5}, "spec_frames must be an integer of at least 0, got 2.5"),
    ],
)
def test_strengths_that_cannot_be_used(options, message):
    with pytest.raises(UserError, match=message):
        Augmentation(KINDS, **options)


def test_the_record_says_what_matters_alone():
    found = Augmentation({"noise": 0.5}, noise_snr=(0, 10), gain_db=(-1, 1)).as_dict()
    assert found == {"kinds": {"noise": 0.5}, "noise_snr": [0.0, 10.0]}


@pytest.mark.filterwarnings("error")
def test_a_clip_without_samples_stays_one():
    nothing, noise, generator = np.zeros(0, np.float32), noise_of(100), np.random.default_rng(0)
    for result in (
        waves.change_speed(nothing, 1.1),
        waves.change_gain(nothing, 3.0),
        waves.add_noise(nothing, noise, 10.0, RATE),
        waves.add_noise(nothing, nothing, 10.0, RATE),
        waves.coloured_noise(0, 1.0, RATE, generator),
        waves.reverberate(nothing, noise),
        waves.telephone(nothing, RATE),
        waves.telephone(nothing, RATE, mu_law=True),
    ):
        assert result.shape == (0,) and result.dtype == np.float32
    assert waves.sounding_power(nothing, RATE) == 0
    assert waves.reverberate(noise, nothing) is noise
