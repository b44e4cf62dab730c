"""CaRot: Towards Calibrated Robust Fine-Tuning of Vision-Language Models.
Oh, Lim, Kim, Han, Yun, Choo, Hauptmann, Cheng, Song; NeurIPS 2024; arXiv 2311.01723 (v7).

Fine-tuned CLIP is more accurate under shift (OOD) than zero-shot CLIP and worse calibrated. OOD
error and OOD calibration error have one upper bound, made of two things that in-distribution (ID)
data can lower: the ID calibration error, and the inverse of the smallest singular value of the ID
representations' covariance. CaRot trains both towers contrastively (FLYP), keeps the image
projection near orthonormal for the second, and learns from a slow average of itself for the first.

    Sec. 3  Ineqs. 1, 2  sigma_min of the bound        singular_values
    Sec. 4  Eq. 3        contrastive loss (FLYP's)     contrastive
            Eq. 4        orthogonality constraint      orthogonality, cross_fnorm (T4)
            Eq. 5        self-distillation             self_distillation
            Eq. 6        all of it                     total
            EMA teacher                                momentum, ema
"""

import torch
import torch.nn.functional as F

# --- method ---------------------------------------------------------------------------------------


def wide(x):
    """fp16 and bf16 as fp32, the rest as it is: in half precision a softmax loses its tail (T9)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def similarity(f, g, s):
    """s f_i.g_j of L2-normalised features; row i: image i, column j: text j.  2 x [B, D] -> [B, B]

    s = exp(logit_scale), which is trained and not clamped.
    """
    f, g = F.normalize(wide(f), dim=1), F.normalize(wide(g), dim=1)
    return s * f @ g.T


def contrastive(logits):
    """Eq. (3): L_MCL = 1/2B sum_i -log softmax(logits_i.)_i + -log softmax(logits_.i)_i.  [B, B]

    The other pairs of a batch are negatives, also those of the same class.
    """
    logits, i = wide(logits), torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, i) + F.cross_entropy(logits.T, i)) / 2


def orthogonality(W_v, form="code"):
    """Eq. (4): L_OC = ||W_v^T W_v - I||_F^2 (paper) or ||W_v^T W_v - I||_F (code).  [in, D] -> []

    W_v maps the image tower's width to the D shared dimensions, so I is D x D (T3). svd: the rival
    of App. Tab. A, whose formula we do not know; here sum_i (sigma_i - 1)^2.
    """
    W_v = wide(W_v)
    if form == "svd":
        return (torch.linalg.svdvals(W_v) - 1).square().sum()
    gap = W_v.T @ W_v - torch.eye(W_v.shape[1], dtype=W_v.dtype, device=W_v.device)
    # Differs (T2): Eq. (4) squares the norm, the authors' code does not, and its 0.2 goes with that
    return gap.square().sum() if form == "paper" else torch.linalg.matrix_norm(gap)


def cross_fnorm(W_v, W_t):
    """||W_v W_t^T||_F, in none of the equations (T4).  [in, D], [in_text, D] -> []

    By the trace of the Gram matrices' product, which are D x D and not in x in_text.
    """
    W_v, W_t = wide(W_v), wide(W_t)
    return (W_v.T @ W_v * (W_t.T @ W_t)).sum().clamp_min(torch.finfo(W_v.dtype).tiny).sqrt()


def self_distillation(logits, teacher_logits, form="code"):
    """Eq. (5): L_SD = 1/B sum_i KL(q~_i. || q_i.) + KL(q~_.i || q_.i), q softmax.  2 x [B, B] -> []

    q: over the texts of the batch for each image, over its images for each text; q~: the teacher's,
    with its own s. No further temperature; summed over both, where Eq. (3) halves. code:
    cross-entropies -sum q~ log q, which have the same gradient and are larger by q~'s entropy (T5).
    """
    logits, teacher_logits = wide(logits), wide(teacher_logits)
    loss = 0
    for z, z_teacher in ((logits, teacher_logits), (logits.T, teacher_logits.T)):
        log_q, log_p = F.log_softmax(z, 1), F.log_softmax(z_teacher, 1)
        gap = log_p - log_q if form == "paper" else -log_q
        loss = loss + (log_p.exp() * gap).sum(1).mean()
    return loss


def total(
    logits, W_v, W_t, teacher_logits=None, oc=0.2, sd=1.5, cross=0.0, oc_form="code", sd_form="code"
):
    """Eq. (6): L = L_MCL + lambda_OC L_OC + lambda_SD L_SD (+ cross ||W_v W_t^T||_F, T4).  -> []

    oc, sd: the two lambdas. All three 0: FLYP. No teacher_logits, as in step 0: no L_SD.
    """
    loss = contrastive(logits)
    if oc:
        loss = loss + oc * orthogonality(W_v, oc_form)
    if cross:
        loss = loss + cross * cross_fnorm(W_v, W_t)
    if sd and teacher_logits is not None:
        loss = loss + sd * self_distillation(logits, teacher_logits, sd_form)
    return loss


def momentum(step, steps, start=0.05, target=0.9, ramp=0.2):
    """m(t) = start + (target - start) t / (ramp T) while t < ramp T, then target (T6)."""
    return start + (target - start) * step / (ramp * steps) if step < ramp * steps else target


@torch.no_grad()
def ema(psi, theta, m):
    """psi <- m psi + (1 - m) theta, in place.  teacher's and student's state dict, number"""
    for name, p in psi.items():
        # Differs (T10): the authors' code leaves BatchNorm's statistics at their pre-trained values
        p.lerp_(theta[name], 1 - m) if p.is_floating_point() else p.copy_(theta[name])


def singular_values(features):
    """Ineq. (1), Fig. 6: those of I^T I / N, I the features with mean 0 and variance 1 in each
    dimension; largest first, the last is sigma_min. Independent dimensions: all 1.  [N, D] -> [D]
    """
    x = features.double() - features.double().mean(0)
    x = x / x.square().mean(0).sqrt().clamp_min(1e-12)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0).clamp_min(0)
