"""Plain words for estimates: the only place of the report that knows one by its name."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """How an estimate is explained: its title, what it shows, what to do when it is off."""

    title: str
    shows: str
    remedy: str = ""


_LONGER = "Train longer, add patients, or choose another backbone."
_MEMORY = "Fewer steps, more augmentation or more patients make a model copy less."

WORDS: dict[str, Words] = {
    "mmd2": Words(
        "Distance of the distributions (MMD²)",
        "How far synthetic scans as a whole lie from held-out scans, in a descriptor of texture, "
        "contrast and size, or in the features that the line names. 0 means that the test cannot "
        "tell them apart.",
        _LONGER,
    ),
    "mmd2_excess": Words(
        "Distance beyond what two groups of real people show",
        "The distance of synthetic from held-out scans, less the distance of training from "
        "held-out scans. 0 means as close as another group of real people would be.",
        _LONGER,
    ),
    "kid": Words(
        "Kernel distance (KID)",
        "The same question as MMD² with another kernel; a second opinion.",
        _LONGER,
    ),
    "frechet": Words(
        "Fréchet distance",
        "Difference of mean and spread in the descriptor, or in the features that the line names. "
        "It grows in small cohorts even when "
        "nothing is wrong: read it beside its floor.",
        _LONGER,
    ),
    "precision": Words(
        "Precision",
        "Share of synthetic scans that look like some real scan.",
        "Low values mean implausible images: train longer.",
    ),
    "recall": Words(
        "Recall",
        "Share of held-out scans that look like something the model makes.",
        "Low values mean missing variety: a larger or longer trained model may show more.",
    ),
    "density": Words(
        "Density",
        "How many real scans lie around each synthetic one, on average.",
    ),
    "coverage": Words(
        "Coverage",
        "Share of held-out scans that have a synthetic scan in their neighbourhood.",
        "Low values mean that kinds of patients are missing from the cohort.",
    ),
    "vendi": Words(
        "Effective number of different scans (Vendi)",
        "How many clearly different scans the cohort amounts to.",
    ),
    "ms_ssim_diversity": Words(
        "Diversity between scans (1 - MS-SSIM)",
        "How much two synthetic scans differ on average, voxel by voxel.",
    ),
    "intensity_w1": Words(
        "Difference of grey values",
        "How far the grey values have to be moved to match those of held-out scans.",
    ),
    "spectrum_distance": Words(
        "Difference of sharpness and texture",
        "Difference of the power spectra: blur, noise and grid patterns show here.",
        "Blurred volumes are typical of a variational autoencoder.",
    ),
    "region_volume_smd": Words(
        "Difference of region volumes",
        "Standardised difference between the volumes of each region, synthetic against held out.",
    ),
    "condition_accuracy": Words(
        "What was asked for is what came",
        "How often a classifier that learned from real scans finds the requested label.",
        "Low values mean that the labels of the cohort cannot be trusted.",
    ),
    "discriminator_auc": Words(
        "Told from real by a classifier",
        "AUC of a classifier between real and synthetic scans: 0.5 is guessing, 1 is certain.",
    ),
    "copies": Words(
        "Samples that copy a patient",
        "Synthetic scans that are closer to one training patient than any other person is, "
        "allowing for flips, shifts and changed contrast. Of everything sampled, before the "
        "filter.",
        _MEMORY,
    ),
    "copied_patients": Words(
        "Patients copied",
        "Share of training patients of whom at least one sample is a copy, before the filter. "
        "None found still leaves the upper bound.",
        _MEMORY,
    ),
    "copies_shipped": Words(
        "Copies in what ships",
        "Copies left after the filter, by a second measure of similarity.",
        "No copy may ship. " + _MEMORY,
    ),
    "authenticity": Words(
        "Authenticity",
        "Share of synthetic scans farther from their nearest training scan than that scan is "
        "from its own nearest. Near-copies bring it towards 0.",
        _MEMORY,
    ),
    "authenticity_excess": Words(
        "Authenticity beyond that of real people",
        "Share of synthetic scans farther from their nearest training scan than that scan is "
        "from its own nearest, less the same share of held-out scans. Below 0, synthetic scans "
        "lie closer to training patients than other people do.",
        _MEMORY,
    ),
    "membership_auc": Words(
        "Can one tell who was trained on?",
        "AUC of an attacker who has a person's scan and the cohort, and guesses whether the "
        "person was trained on. 0.5 is guessing.",
        _MEMORY,
    ),
    "membership_tpr_at_fpr10": Words(
        "Training patients exposed at 10 % false alarms",
        "Share of training patients that the same attacker names when wrong about one in ten "
        "of the others.",
        _MEMORY,
    ),
    "singling_out": Words(
        "Do descriptions fit one patient alone?",
        "Risk that a description read off the cohort (a few labels and traits of the image) fits "
        "exactly one training patient, beyond what it does to people who were never in it.",
        _MEMORY,
    ),
    "linkability": Words(
        "Does the cohort link two records of a patient?",
        "Risk that who holds two parts of records (one with the labels and the upper half of the "
        "image, one with the lower half) sees by the cohort which belong together, beyond what it "
        "links of people who were never in it.",
        _MEMORY,
    ),
    "attribute_inference": Words(
        "Does the cohort give a patient's label away?",
        "Risk that who has a training patient's image learns the label from the most similar "
        "synthetic scan, beyond what the cohort teaches about anybody.",
        _MEMORY,
    ),
    "auc_trtr": Words(
        "Classifier trained on real scans",
        "AUC on held-out patients of a classifier trained on real scans: the yardstick.",
    ),
    "auc_tstr": Words(
        "Classifier trained on synthetic scans",
        "AUC on held-out patients of a classifier that saw only synthetic scans.",
        _LONGER,
    ),
    "auc_augmented": Words(
        "Classifier trained on both",
        "AUC on held-out patients when synthetic scans are added to the real ones.",
    ),
    "auc_classical_augmentation": Words(
        "Classifier with classical augmentation",
        "AUC on held-out patients with shifts, turns and contrast instead of synthetic scans.",
    ),
    "auc_tstr_minus_trtr": Words(
        "Synthetic instead of real scans",
        "What a classifier loses when it is taught by synthetic scans alone: the difference of the "
        "two AUCs on the same patients.",
        _LONGER,
    ),
    "auc_augmented_minus_trtr": Words(
        "Gain by adding synthetic scans",
        "What a classifier gains when synthetic scans are added to the real ones.",
    ),
    "auc_augmented_minus_classical": Words(
        "Gain over classical augmentation",
        "Synthetic scans beside the real ones, against altered copies of the real ones, which cost "
        "nothing.",
    ),
    "r_trtr": Words(
        "Prediction taught by real scans",
        "Correlation on held-out patients of a number with what a model taught by real scans "
        "predicts: the yardstick.",
    ),
    "r_tstr": Words(
        "Prediction taught by synthetic scans",
        "The same correlation of a model that saw only synthetic scans.",
        _LONGER,
    ),
    "r_augmented": Words(
        "Prediction taught by both",
        "The same correlation when synthetic scans are added to the real ones.",
    ),
    "r_classical_augmentation": Words(
        "Prediction with classical augmentation",
        "The same correlation with shifted, turned and brightened copies instead.",
    ),
    "r_tstr_minus_trtr": Words(
        "Synthetic instead of real scans, for a number",
        "What the correlation loses when the model is taught by synthetic scans alone.",
        _LONGER,
    ),
    "r_augmented_minus_trtr": Words(
        "Gain by adding synthetic scans, for a number",
        "What the correlation gains when synthetic scans are added to the real ones.",
    ),
    "r_augmented_minus_classical": Words(
        "Gain over classical augmentation, for a number",
        "Synthetic scans beside the real ones, against altered copies of the real ones.",
    ),
    "segmentability": Words(
        "Do images show what their masks say?",
        "Agreement (Dice) of each synthetic mask with what a segmenter taught by real scans sees "
        "in its image. Above its floor the scans are easier to read than real ones.",
        "Low values mean that image and mask do not belong together: train longer.",
    ),
    "dice_trtr": Words(
        "Segmenter trained on real scans",
        "Agreement (Dice) with the masks of held-out patients of a segmenter trained on real "
        "scans: the yardstick.",
    ),
    "dice_tstr": Words(
        "Segmenter trained on synthetic scans",
        "The same agreement of a segmenter that saw only synthetic scans and their masks.",
        _LONGER,
    ),
    "dice_augmented": Words(
        "Segmenter trained on both",
        "The same agreement when synthetic scans are added to the real ones.",
    ),
    "dice_classical_augmentation": Words(
        "Segmenter with classical augmentation",
        "The same agreement with shifted, turned and brightened copies instead.",
    ),
    "dice_tstr_minus_trtr": Words(
        "Synthetic instead of real scans, for a segmenter",
        "What a segmenter loses when it is taught by synthetic scans alone.",
        _LONGER,
    ),
    "dice_augmented_minus_trtr": Words(
        "Gain by adding synthetic scans, for a segmenter",
        "What a segmenter gains when synthetic scans are added to the real ones.",
    ),
    "dice_augmented_minus_classical": Words(
        "Gain over classical augmentation, for a segmenter",
        "Synthetic scans beside the real ones, against altered copies of the real ones.",
    ),
    "whitebox_auc": Words(
        "Do the weights tell who was trained on?",
        "AUC of an attacker who has a person's scan and the trained weights themselves, which "
        "never leave the house. 0.5 is guessing. What the cohort tells is membership_auc.",
    ),
    "whitebox_tpr_at_fpr10": Words(
        "Training patients exposed by the weights at 10 % false alarms",
        "Share of training patients that the attacker with the weights names when wrong about one "
        "in ten of the others.",
    ),
    "epsilon_lower_bound": Words(
        "Leak found by the audit",
        "Lower bound of epsilon that canaries show.",
    ),
}


def words(name: str) -> Words:
    """The words for an estimate; a name that is not in the table is shown as it is.

    >>> words("my_own_score").title
    'My own score'
    """
    text = name.replace("_", " ")
    return WORDS.get(name, Words(text[:1].upper() + text[1:], "No explanation is on file."))


def direction(better: str, target: float | None) -> str:
    """Which way is better, in words."""
    if better == "match":
        return "Best near its target." if target is None else f"Best near {target:.3g}."
    return f"{better.capitalize()} is better."
