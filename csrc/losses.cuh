// What tells the discrepancies apart: a class's part of the loss, and its gradients. With p of the teacher and q of the
// student, those of the divergences follow from p, q and their log-ratio.
#pragma once

namespace dfkd_fast {

struct Pair {
  float student;
  float teacher;
};

// Of the logits themselves: a class's part, and its derivative by the student's logit; that by the teacher's is its negative.
struct L1 {
  __device__ static float loss(float student, float teacher) { return fabsf(student - teacher); }

  __device__ static float gradient(float student, float teacher) {
    const float difference = student - teacher;
    return static_cast<float>((difference > 0.0f) - (difference < 0.0f));
  }
};

// The finite size of a log-ratio where a probability of 0, which multiplies it, makes it infinite.
constexpr float kHuge = 1e30f;

struct KullbackLeibler {
  // log(p / q), and nothing for the student.
  __device__ static Pair divergence(float q, float p, float log_ratio) { return {0.0f, p == 0.0f ? -kHuge : log_ratio}; }

  // A class's part: p d + (q - p) with d = log(p / q), because q - p adds up to 0 over a row. It is never negative, and an
  // error of d common to a row cancels, as it does not from p d. Near 0 by the series of d + exp(-d) - 1.
  __device__ static float loss(float q, float p, const Pair& divergence) {
    const float d = divergence.teacher;
    const float near = p * (d * d) * (1.0f / 2 - d * (1.0f / 6 - d * (1.0f / 24 - d * (1.0f / 120 - d * (1.0f / 720)))));
    return fabsf(d) < 0.25f ? near : p * d + (q - p);
  }

  // `mean` is the expectation of the divergence, its student's under q and its teacher's under p.
  __device__ static Pair gradient(float q, float p, const Pair& divergence, const Pair& mean) {
    return {q - p, p * (divergence.teacher - mean.teacher)};
  }
};

struct JensenShannon {
  // log(q / m) and log(p / m) where m = (p + q) / 2. With r = |log(p / q)|, the greater of p and q is 2m / (1 + exp(-r)).
  __device__ static Pair divergence(float q, float p, float log_ratio) {
    log_ratio = p == 0.0f ? -kHuge : q == 0.0f ? kHuge : log_ratio;
    const float distance = fabsf(log_ratio);
    const float greater = -log1pf(0.5f * expm1f(-distance));
    const float lesser = greater - distance;
    return log_ratio > 0.0f ? Pair{lesser, greater} : Pair{greater, lesser};
  }

  __device__ static float loss(float q, float p, const Pair& divergence) {
    return 0.5f * (q * divergence.student + p * divergence.teacher);
  }

  __device__ static Pair gradient(float q, float p, const Pair& divergence, const Pair& mean) {
    return {0.5f * q * (divergence.student - mean.student), 0.5f * p * (divergence.teacher - mean.teacher)};
  }
};

}  // namespace dfkd_fast
