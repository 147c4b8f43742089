// What the kernels of the discrepancies share: arguments, results, and the comparison of a row.
#pragma once

#include "losses.cuh"
#include "rows.cuh"

#include <cfloat>

namespace dfkd_fast {

struct Results {
  double scale;
  float* loss;
  int64_t* agreement;  // null if not requested

  __device__ void write(double loss_sum, double agreed) const {
    *loss = static_cast<float>(scale * loss_sum);
    if (agreement != nullptr) {
      *agreement = static_cast<int64_t>(agreed);
    }
  }
};

struct Problem {
  View student;
  View teacher;
  View student_grad_unscaled;  // data is null if the gradient is not required
  View teacher_grad_unscaled;
  int64_t rows;
  int64_t pixels;
  int32_t classes;
  int32_t team;  // threads per row: a power of two up to a warp, or a block
  float inverse_temperature;
  Results results;
  double2* partials;  // (loss, agreement) per block
};

// Adds over the block; a single block writes the results, several write partial sums.
template <int kBlock>
__device__ __forceinline__ void write_results(const Problem& problem, double loss, int agreements) {
  const double loss_sum = reduce<kBlock>(loss, kBlock, Sum());
  const double agreed_sum = reduce<kBlock>(static_cast<double>(agreements), kBlock, Sum());
  if (threadIdx.x != 0) {
    return;
  }
  if (gridDim.x == 1) {
    problem.results.write(loss_sum, agreed_sum);
  } else {
    problem.partials[blockIdx.x] = make_double2(loss_sum, agreed_sum);
  }
}

// Returns the loss of the thread's classes, and replaces logits by gradients before scaling; L1 has the student's only.
template <typename Loss, int kCount>
__device__ __forceinline__ float compare_row(
    const Problem& problem, const Row& row, float (&student)[kCount], float (&teacher)[kCount], int& agreements) {
  float loss = 0.0f;
  if (problem.results.agreement != nullptr) {
    Rank best_student = 0;
    Rank best_teacher = 0;
    update_top(best_student, row, 0, student);
    update_top(best_teacher, row, 0, teacher);
    agreements += top_classes_agree(best_student, best_teacher, row);
  }
  if constexpr (std::is_same_v<Loss, L1>) {
    for_each_class<kCount>(row, 0, [&](int i) {
      loss += L1::loss(student[i], teacher[i]);
      student[i] = L1::gradient(student[i], teacher[i]);
    });
  } else {
    // Lowest finite number instead of -inf, so that leading logits may be -inf.
    float student_max = -FLT_MAX;
    float teacher_max = -FLT_MAX;
    for_each_class<kCount>(row, 0, [&](int i) {
      student_max = fmaxf(student_max, student[i]);
      teacher_max = fmaxf(teacher_max, teacher[i]);
    });
    student_max = reduce(student_max, row.team, Max());
    teacher_max = reduce(teacher_max, row.team, Max());
    float log_ratio[kCount];
    float student_sum = 0.0f;
    float teacher_sum = 0.0f;
    // To base 2, where exponential and logarithm take few instructions.
    const float inverse_temperature = problem.inverse_temperature * kLog2E;
    for_each_class<kCount>(row, 0, [&](int i) {
      const float student_logit = (student[i] - student_max) * inverse_temperature;
      const float teacher_logit = (teacher[i] - teacher_max) * inverse_temperature;
      student_sum += student[i] = exp2_flushed(student_logit);
      teacher_sum += teacher[i] = exp2_flushed(teacher_logit);
      log_ratio[i] = teacher_logit - student_logit;
    });
    student_sum = reduce(student_sum, row.team, Sum());
    teacher_sum = reduce(teacher_sum, row.team, Sum());
    const float student_factor = __fdividef(1.0f, student_sum);
    const float teacher_factor = __fdividef(1.0f, teacher_sum);
    // Rounding errors of the shift are common to the row: they change neither the gradients nor, to first order, the loss.
    const float shift = log2f(student_sum) - log2f(teacher_sum);
    Pair divergence[kCount];
    Pair mean{0.0f, 0.0f};
    for_each_class<kCount>(row, 0, [&](int i) {
      student[i] *= student_factor;
      teacher[i] *= teacher_factor;
      divergence[i] = Loss::divergence(student[i], teacher[i], (log_ratio[i] + shift) * kLn2);
      loss += Loss::loss(student[i], teacher[i], divergence[i]);
      mean.student += student[i] * divergence[i].student;
      mean.teacher += teacher[i] * divergence[i].teacher;
    });
    if (problem.student_grad_unscaled.data != nullptr || problem.teacher_grad_unscaled.data != nullptr) {
      mean.student = reduce(mean.student, row.team, Sum());
      mean.teacher = reduce(mean.teacher, row.team, Sum());
      for_each_class<kCount>(row, 0, [&](int i) {
        const Pair gradient = Loss::gradient(student[i], teacher[i], divergence[i], mean);
        student[i] = gradient.student * problem.inverse_temperature;
        teacher[i] = gradient.teacher * problem.inverse_temperature;
      });
    }
  }
  return loss;
}

}  // namespace dfkd_fast
