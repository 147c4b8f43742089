// Per-class loss and gradients of each discrepancy. p is the teacher's probability, q the student's; the divergences are
// functions of p, q and log(p / q).
#pragma once

namespace dfkd_fast {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^x; results below 2^-126 are 0. exp2f, which does not flush them, takes four times as many instructions, expf eight times.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

struct Pair {
  float student;
  float teacher;
};

// On logits. `gradient` is the derivative with respect to the student's logit; the teacher's is its negative.
struct L1 {
  __device__ static float loss(float student, float teacher) { return fabsf(student - teacher); }

  __device__ static float gradient(float student, float teacher) {
    const float difference = student - teacher;
    return static_cast<float>((difference > 0.0f) - (difference < 0.0f));
  }
};

// Finite substitute for an infinite log ratio whose factor is a probability of 0.
constexpr float kHuge = 1e30f;

struct KullbackLeibler {
  // Returns log(p / q) for the teacher; the student's is unused.
  __device__ static Pair divergence(float q, float p, float log_ratio) { return {0.0f, p == 0.0f ? -kHuge : log_ratio}; }

  // p d + (q - p) with d = log(p / q), where q - p sums to 0 over a row. Each term is non-negative, and an error of d common
  // to a row cancels, unlike in p d. Near 0, the series of d + exp(-d) - 1 is used.
  __device__ static float loss(float q, float p, const Pair& divergence) {
    const float d = divergence.teacher;
    const float near = p * (d * d) * (1.0f / 2 - d * (1.0f / 6 - d * (1.0f / 24 - d * (1.0f / 120 - d * (1.0f / 720)))));
    return fabsf(d) < 0.25f ? near : p * d + (q - p);
  }

  // `mean` is the expectation of `divergence`: of the student's under q, of the teacher's under p.
  __device__ static Pair gradient(float q, float p, const Pair& divergence, const Pair& mean) {
    return {q - p, p * (divergence.teacher - mean.teacher)};
  }
};

struct JensenShannon {
  // Returns log(q / m) and log(p / m), m = (p + q) / 2. With r = |log(p / q)|, m = max(p, q) (1 + exp(-r)) / 2, of whose logarithm
  // the series near 0 is used: 0.5 + 0.5 exp(-r) is rounded. log1p and expm1 would take more instructions.
  __device__ static Pair divergence(float q, float p, float log_ratio) {
    log_ratio = p == 0.0f ? -kHuge : q == 0.0f ? kHuge : log_ratio;
    const float distance = fabsf(log_ratio);
    const float square = distance * distance;
    const float near = 0.5f * distance - square * (1.0f / 8 - square * (1.0f / 192 - square * (1.0f / 2880)));
    const float greater = distance < 0.25f ? near : -logf(0.5f + 0.5f * exp2_flushed(-kLog2E * distance));
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
