// What the discrepancies add up, and their gradients: with p of the teacher and q of the student, everything is told by
// p, q and their log-ratio.
#pragma once

namespace dfkd_fast {

struct Pair {
  float student;
  float teacher;
};

struct L1 {};

struct KullbackLeibler {
  // log(p / q), and nothing for the student.
  __device__ static Pair divergence(float log_ratio) { return {0.0f, log_ratio}; }

  // `mean` is the expectation of the divergence, its student's under q and its teacher's under p.
  __device__ static float loss(const Pair& mean) { return mean.teacher; }

  __device__ static Pair gradient(float q, float p, const Pair& divergence, const Pair& mean) {
    return {q - p, p * (divergence.teacher - mean.teacher)};
  }
};

struct JensenShannon {
  // log(q / m) and log(p / m) where m = (p + q) / 2. With r = |log(p / q)|, the greater of p and q is 2m / (1 + exp(-r)).
  __device__ static Pair divergence(float log_ratio) {
    const float distance = fabsf(log_ratio);
    const float greater = -log1pf(0.5f * expm1f(-distance));
    const float lesser = greater - distance;
    return log_ratio > 0.0f ? Pair{lesser, greater} : Pair{greater, lesser};
  }

  __device__ static float loss(const Pair& mean) { return 0.5f * (mean.student + mean.teacher); }

  __device__ static Pair gradient(float q, float p, const Pair& divergence, const Pair& mean) {
    return {0.5f * q * (divergence.student - mean.student), 0.5f * p * (divergence.teacher - mean.teacher)};
  }
};

}  // namespace dfkd_fast
