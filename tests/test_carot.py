"""carot.py against worked numbers, its losses' properties, its training, and the paper's tables."""

import math

import pytest
import torch
import torch.nn.functional as F

import carot


def random_logits(n=8, seed=0, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, n, generator=generator, dtype=torch.double).to(dtype)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# Eq. (3): contrastive loss


def test_contrastive_loss_of_two_pairs_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [math.log(2), math.log(4)]])
    rows = -math.log(3 / 4) - math.log(4 / 6)
    columns = -math.log(3 / 5) - math.log(4 / 5)
    assert carot.contrastive(logits).item() == pytest.approx((rows + columns) / 4)


def test_contrastive_loss_is_the_mean_of_two_cross_entropies():
    logits, i = random_logits(), torch.arange(8)
    expected = (F.cross_entropy(logits, i) + F.cross_entropy(logits.T, i)) / 2
    torch.testing.assert_close(carot.contrastive(logits), expected)


def test_pairs_of_one_class_are_negatives_of_each_other():
    f = F.normalize(torch.ones(6, 4), dim=1)  # six times the same image and caption
    assert carot.contrastive(carot.similarity(f, f, 10.0)).item() == pytest.approx(math.log(6))


def test_similarity_is_the_scaled_cosine_with_images_in_rows():
    f, g = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8], [1.0, 0.0]]) * 10
    torch.testing.assert_close(carot.similarity(f, g, 10.0), expected)


# Eq. (4): orthogonality


def test_orthogonality_of_a_two_by_two_by_hand():
    W = torch.tensor([[1.0, 1.0], [0.0, 2.0]])  # W^T W - I = [[0, 1], [1, 4]]
    assert carot.orthogonality(W, "paper").item() == pytest.approx(18.0)
    assert carot.orthogonality(W, "code").item() == pytest.approx(math.sqrt(18))


def test_the_codes_form_is_the_root_of_the_papers():
    W = random_matrix(7, 4)
    root, square = carot.orthogonality(W, "code"), carot.orthogonality(W, "paper")
    torch.testing.assert_close(root**2, square)


@pytest.mark.parametrize("form", ["paper", "code", "svd"])
def test_orthonormal_columns_cost_nothing_and_have_a_finite_gradient(form):
    W = torch.linalg.qr(random_matrix(9, 5))[0].requires_grad_()
    loss = carot.orthogonality(W, form)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and W.grad.isfinite().all()


def test_the_codes_gradient_is_finite_at_exactly_zero():
    W = torch.eye(3, requires_grad=True)
    carot.orthogonality(W).backward()
    assert torch.equal(W.grad, torch.zeros(3, 3))


def test_the_svd_rival_pulls_every_singular_value_to_one():
    W = torch.diag(torch.tensor([3.0, 0.5]))
    assert carot.orthogonality(W, "svd").item() == pytest.approx(4 + 0.25)


def test_cross_fnorm_is_the_norm_of_the_product():
    W_v, W_t = random_matrix(7, 4), random_matrix(5, 4, seed=1)
    torch.testing.assert_close(carot.cross_fnorm(W_v, W_t), (W_v @ W_t.T).norm())
    assert carot.cross_fnorm(torch.eye(2), torch.eye(2)).item() == pytest.approx(math.sqrt(2))


# Eq. (5): self-distillation


def test_self_distillation_of_two_pairs_by_hand():
    student = torch.zeros(2, 2)  # every row and column: 1/2, 1/2
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])  # 3/4, 1/4 either way
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert carot.self_distillation(student, teacher, "paper").item() == pytest.approx(2 * kl)
    assert carot.self_distillation(student, teacher).item() == pytest.approx(2 * math.log(2))


def test_the_directions_are_images_over_texts_and_texts_over_images():
    student, teacher = random_logits(5), random_logits(5, seed=1)
    by_image = F.cross_entropy(student, teacher.softmax(1))
    by_text = F.cross_entropy(student.T, teacher.T.softmax(1))
    torch.testing.assert_close(carot.self_distillation(student, teacher), by_image + by_text)


def test_both_forms_have_one_gradient_and_differ_by_the_teachers_entropy():
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1)
    kl, ce = (carot.self_distillation(student, teacher, form) for form in ("paper", "code"))
    (by_kl,), (by_ce,) = (torch.autograd.grad(loss, student) for loss in (kl, ce))
    torch.testing.assert_close(by_kl, by_ce)
    entropy = sum(-(q * q.log()).sum(1).mean() for q in (teacher.softmax(1), teacher.T.softmax(1)))
    torch.testing.assert_close(ce - kl, entropy)


def test_a_teacher_equal_to_the_student_gives_no_gradient_so_step_0_loses_nothing():
    student = random_logits().requires_grad_()
    carot.self_distillation(student, student.detach()).backward()
    assert student.grad.abs().max() < 1e-15


# Eq. (6)


def test_total_is_the_sum_of_its_terms_with_their_coefficients():
    logits, teacher = random_logits(), random_logits(seed=1)
    W_v, W_t = random_matrix(9, 5), random_matrix(6, 5, seed=1)
    got = carot.total(logits, W_v, W_t, teacher, oc=0.2, sd=1.5, cross=0.05)
    expected = (
        carot.contrastive(logits)
        + 0.2 * carot.orthogonality(W_v)
        + 1.5 * carot.self_distillation(logits, teacher)
        + 0.05 * (W_v @ W_t.T).norm()
    )
    torch.testing.assert_close(got, expected)


def test_total_without_coefficients_or_teacher_is_flyps_loss():
    logits, W = random_logits(), random_matrix(9, 5)
    flyp = carot.contrastive(logits)
    assert torch.equal(carot.total(logits, W, W, random_logits(seed=1), oc=0, sd=0), flyp)
    assert torch.equal(carot.total(logits, W, W, None, oc=0), flyp)  # step 0


def test_gradients_of_every_loss_are_right_in_fp64():
    f, g, W_v, W_t = (random_matrix(4, 3, seed=i).requires_grad_() for i in range(4))
    teacher = random_logits(4, seed=5)
    for oc_form in ("paper", "code", "svd"):
        for sd_form in ("paper", "code"):

            def loss(f, g, W_v, W_t, s, forms=(oc_form, sd_form)):
                logits = carot.similarity(f, g, s.exp())
                return carot.total(logits, W_v, W_t, teacher, 0.2, 1.5, 0.05, *forms)

            s = torch.tensor(1.0, dtype=torch.double, requires_grad=True)
            assert torch.autograd.gradcheck(loss, (f, g, W_v, W_t, s))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision_inputs_give_the_loss_of_their_values(dtype, digits):
    """Logits of 100 times a cosine: in fp16 most of a softmax is 0, and its log -inf (T9)."""
    f, g = (F.normalize(random_matrix(64, 32, seed=i), dim=1).to(dtype) for i in (0, 1))
    W = random_matrix(256, 32).to(dtype)
    logits, exact = carot.similarity(f, g, 100.0), carot.similarity(f.double(), g.double(), 100.0)
    teacher = exact.flip(0)
    got = carot.total(logits.to(dtype), W, W, teacher.to(dtype), cross=0.05)
    expected = carot.total(exact, W.double(), W.double(), teacher, cross=0.05)
    assert got.dtype == torch.float32 and got.isfinite()
    torch.testing.assert_close(got.double(), expected, rtol=digits, atol=0)


# the teacher

STEPS = 10 * math.ceil(1_281_167 / 512)  # ImageNet, batch 512, 10 epochs


def test_momentum_has_its_eleven_worked_values_and_then_0_9():
    worked = [0.05, 0.1349, 0.2198, 0.3047, 0.3896, 0.4745, 0.5594, 0.6443, 0.7292, 0.8141, 0.8990]
    got = [carot.momentum(t, STEPS) for t in range(0, 5001, 500)]
    assert STEPS == 25_030 and got == pytest.approx(worked, abs=1e-4)
    assert [carot.momentum(t, STEPS) for t in (5006, 5500, 25_000)] == [0.9] * 3


def test_ema_mixes_floats_and_copies_counters():
    psi = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor(4.0), "n": torch.tensor(3)}
    theta = {"w": torch.tensor([3.0, 0.0]), "running_var": torch.tensor(0.0), "n": torch.tensor(8)}
    carot.ema(psi, theta, 0.25)
    assert psi["w"].tolist() == [2.5, 0.5]
    assert psi["running_var"].item() == 1.0 and psi["n"].item() == 8


def test_ema_with_momentum_one_keeps_the_teacher_and_zero_takes_the_student():
    psi, theta = {"w": torch.tensor([0.1, 7.0])}, {"w": torch.tensor([0.3, 5.0])}
    carot.ema(psi, theta, 1.0)
    assert torch.equal(psi["w"], torch.tensor([0.1, 7.0]))
    carot.ema(psi, theta, 0.0)
    assert torch.equal(psi["w"], theta["w"])


# the bound's singular values


def test_independent_dimensions_have_singular_values_one_at_any_scale():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    features = signs * torch.tensor([100.0, 0.01]) + 5
    torch.testing.assert_close(carot.singular_values(features), torch.ones(2).double())


def test_singular_values_of_a_correlation_by_hand():
    x = random_matrix(50_000, 2)
    correlated = torch.stack([x[:, 0], 0.6 * x[:, 0] + 0.8 * x[:, 1]], 1)
    largest, smallest = carot.singular_values(correlated).tolist()
    assert (largest, smallest) == pytest.approx((1.6, 0.4), abs=0.01)


def test_a_repeated_or_constant_dimension_has_sigma_min_zero():
    x = random_matrix(100, 2)
    assert carot.singular_values(torch.stack([x[:, 0], x[:, 0]], 1))[-1] < 1e-12
    assert carot.singular_values(torch.cat([x, torch.ones(100, 1)], 1))[-1] == 0
