// L1, Kullback-Leibler and Jensen-Shannon discrepancies of logits, with their gradients and the top-1 agreement.
//
// A row is the C logits of one sample or pixel. A team of adjacent threads processes it: one thread where pixels are
// contiguous in memory, up to a warp where classes are, a block for long rows. Rows that fit are held in registers, so
// that logits are read once; longer rows are read once per pass. Losses are accumulated in float64: one partial sum per
// block and a second kernel that adds them in order, so that results are bitwise reproducible.

#include "operators.h"

#include "images.cuh"
#include "launch.cuh"
#include "losses.cuh"
#include "rows.cuh"
#include "dtype.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfloat>

namespace dfkd_fast {
namespace {

constexpr int kMaxBlocks = 2048;
constexpr int kBatch = 8;  // classes that a thread loads at once from a row that does not fit into registers

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

__device__ __forceinline__ Row row_of(const Problem& problem, int64_t row) {
  const int lane = threadIdx.x % problem.team;
  const int64_t n = row / problem.pixels;
  const int count = row < problem.rows ? (problem.classes - lane + problem.team - 1) / problem.team : 0;
  return {n, row - n * problem.pixels, lane, count, problem.team};
}

// ---- Writing the results

template <int kCount>
__device__ __forceinline__ void store_gradients(
    const Problem& problem, const Row& row, int begin, const float (&student)[kCount], const float (&teacher)[kCount]) {
  if (problem.student_grad_unscaled.data != nullptr) {
    store_share(problem.student_grad_unscaled, row, begin, student);
  }
  if (problem.teacher_grad_unscaled.data != nullptr) {
    store_share(problem.teacher_grad_unscaled, row, begin, teacher);
  }
}

__device__ __forceinline__ void write_results(const Problem& problem, float loss, int agreements) {
  const double loss_sum = reduce(static_cast<double>(loss), kThreads, Sum());
  const double agreed_sum = reduce(static_cast<double>(agreements), kThreads, Sum());
  if (threadIdx.x != 0) {
    return;
  }
  if (gridDim.x == 1) {
    problem.results.write(loss_sum, agreed_sum);
  } else {
    problem.partials[blockIdx.x] = make_double2(loss_sum, agreed_sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const double2* __restrict__ partials, int count, const __grid_constant__ Results results) {
  double loss = 0;
  double agreed = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const double2 partial = partials[i];
    loss += partial.x;
    agreed += partial.y;
  }
  loss = reduce(loss, kThreads, Sum());
  agreed = reduce(agreed, kThreads, Sum());
  if (threadIdx.x == 0) {
    results.write(loss, agreed);
  }
}

// Grid-stride loop over rows. All threads of a block run the same number of iterations, because `reduce` synchronizes.
template <typename Body>
__device__ __forceinline__ void for_each_row(const Problem& problem, Body&& body) {
  const int teams = kThreads / problem.team;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < problem.rows; first += static_cast<int64_t>(gridDim.x) * teams) {
    body(row_of(problem, first + threadIdx.x / problem.team));
  }
}

// ---- Rows held in registers, kPerThread classes per thread

template <typename Loss, int kPerThread>
__global__ void __launch_bounds__(kThreads, kPerThread <= 16 ? 4 : 2) register_kernel(const __grid_constant__ Problem problem) {
  float loss = 0.0f;
  int agreements = 0;
  for_each_row(problem, [&](const Row& row) {
    float student[kPerThread];
    float teacher[kPerThread];
    load_share(problem.student, row, 0, student);
    load_share(problem.teacher, row, 0, teacher);
    if (problem.results.agreement != nullptr) {
      Rank best_student = 0;
      Rank best_teacher = 0;
      update_top(best_student, row, 0, student);
      update_top(best_teacher, row, 0, teacher);
      agreements += top_classes_agree(best_student, best_teacher, row);
    }
    if constexpr (std::is_same_v<Loss, L1>) {
      for_each_class<kPerThread>(row, 0, [&](int i) {
        loss += L1::loss(student[i], teacher[i]);
        student[i] = L1::gradient(student[i], teacher[i]);
      });
      if (problem.student_grad_unscaled.data != nullptr) {
        store_share_as<int8_t>(problem.student_grad_unscaled, row, 0, student);
      }
    } else {
      // Lowest finite number instead of -inf, so that leading logits may be -inf.
      float student_max = -FLT_MAX;
      float teacher_max = -FLT_MAX;
      for_each_class<kPerThread>(row, 0, [&](int i) {
        student_max = fmaxf(student_max, student[i]);
        teacher_max = fmaxf(teacher_max, teacher[i]);
      });
      student_max = reduce(student_max, row.team, Max());
      teacher_max = reduce(teacher_max, row.team, Max());
      float log_ratio[kPerThread];
      float student_sum = 0.0f;
      float teacher_sum = 0.0f;
      for_each_class<kPerThread>(row, 0, [&](int i) {
        const float student_logit = (student[i] - student_max) * problem.inverse_temperature;
        const float teacher_logit = (teacher[i] - teacher_max) * problem.inverse_temperature;
        student_sum += student[i] = expf(student_logit);
        teacher_sum += teacher[i] = expf(teacher_logit);
        log_ratio[i] = teacher_logit - student_logit;
      });
      student_sum = reduce(student_sum, row.team, Sum());
      teacher_sum = reduce(teacher_sum, row.team, Sum());
      const float student_factor = 1.0f / student_sum;
      const float teacher_factor = 1.0f / teacher_sum;
      const float shift = logf(student_sum) - logf(teacher_sum);
      Pair divergence[kPerThread];
      Pair mean{0.0f, 0.0f};
      for_each_class<kPerThread>(row, 0, [&](int i) {
        student[i] *= student_factor;
        teacher[i] *= teacher_factor;
        divergence[i] = Loss::divergence(student[i], teacher[i], log_ratio[i] + shift);
        loss += Loss::loss(student[i], teacher[i], divergence[i]);
        mean.student += student[i] * divergence[i].student;
        mean.teacher += teacher[i] * divergence[i].teacher;
      });
      if (problem.student_grad_unscaled.data != nullptr || problem.teacher_grad_unscaled.data != nullptr) {
        mean.student = reduce(mean.student, row.team, Sum());
        mean.teacher = reduce(mean.teacher, row.team, Sum());
        for_each_class<kPerThread>(row, 0, [&](int i) {
          const Pair gradient = Loss::gradient(student[i], teacher[i], divergence[i], mean);
          student[i] = gradient.student * problem.inverse_temperature;
          teacher[i] = gradient.teacher * problem.inverse_temperature;
        });
        store_gradients(problem, row, 0, student, teacher);
      }
    }
  });
  write_results(problem, loss, agreements);
}

// ---- Rows of any length, kBatch classes at a time

// Online softmax of one side of a row. The running sum is float64, so that thousands of small terms are not lost next to
// a large one; sums within a batch are float32.
struct Softmax {
  float max = -FLT_MAX;
  double sum = 0.0;  // of exp(logit - max)

  template <int kCount>
  __device__ void add(const Row& row, int begin, const float (&logits)[kCount], float inverse_temperature) {
    const float old_max = max;
    for_each_class<kCount>(row, begin, [&](int i) { max = fmaxf(max, logits[i]); });
    float batch_sum = 0.0f;
    for_each_class<kCount>(row, begin, [&](int i) { batch_sum += expf((logits[i] - max) * inverse_temperature); });
    sum = sum * expf((old_max - max) * inverse_temperature) + batch_sum;
  }

  __device__ void all_reduce(int team, float inverse_temperature) {
    const float thread_max = max;
    max = reduce(max, team, Max());
    sum = reduce(sum * expf((thread_max - max) * inverse_temperature), team, Sum());
  }
};

template <typename Loss>
__global__ void __launch_bounds__(kThreads, 4) streamed_kernel(const __grid_constant__ Problem problem) {
  const float inverse_temperature = problem.inverse_temperature;
  float loss = 0.0f;
  int agreements = 0;
  for_each_row(problem, [&](const Row& row) {
    float student[kBatch];
    float teacher[kBatch];
    // Loads the row batch by batch into `student` and `teacher` and calls `visit(begin)` for each.
    const auto pass = [&](auto&& visit) {
      for (int begin = 0; begin < row.count; begin += kBatch) {
        load_share(problem.student, row, begin, student);
        load_share(problem.teacher, row, begin, teacher);
        visit(begin);
      }
    };
    Rank best_student = 0;
    Rank best_teacher = 0;
    const auto rank = [&](int begin) {
      if (problem.results.agreement != nullptr) {
        update_top(best_student, row, begin, student);
        update_top(best_teacher, row, begin, teacher);
      }
    };
    if constexpr (std::is_same_v<Loss, L1>) {
      pass([&](int begin) {
        rank(begin);
        for_each_class<kBatch>(row, begin, [&](int i) {
          loss += L1::loss(student[i], teacher[i]);
          student[i] = L1::gradient(student[i], teacher[i]);
        });
        if (problem.student_grad_unscaled.data != nullptr) {
          store_share_as<int8_t>(problem.student_grad_unscaled, row, begin, student);
        }
      });
    } else {
      Softmax student_softmax;
      Softmax teacher_softmax;
      pass([&](int begin) {
        rank(begin);
        student_softmax.add(row, begin, student, inverse_temperature);
        teacher_softmax.add(row, begin, teacher, inverse_temperature);
      });
      student_softmax.all_reduce(row.team, inverse_temperature);
      teacher_softmax.all_reduce(row.team, inverse_temperature);
      const float student_factor = 1.0f / static_cast<float>(student_softmax.sum);
      const float teacher_factor = 1.0f / static_cast<float>(teacher_softmax.sum);
      const float shift = logf(static_cast<float>(student_softmax.sum)) - logf(static_cast<float>(teacher_softmax.sum));
      // Replaces logits by probabilities and returns their log ratios.
      const auto compare = [&](float& student_value, float& teacher_value) {
        const float student_logit = (student_value - student_softmax.max) * inverse_temperature;
        const float teacher_logit = (teacher_value - teacher_softmax.max) * inverse_temperature;
        student_value = expf(student_logit) * student_factor;
        teacher_value = expf(teacher_logit) * teacher_factor;
        return Loss::divergence(student_value, teacher_value, teacher_logit - student_logit + shift);
      };
      double loss_sum = 0.0;
      double student_sum = 0.0;
      double teacher_sum = 0.0;
      pass([&](int begin) {
        float batch_loss = 0.0f;
        Pair sum{0.0f, 0.0f};
        for_each_class<kBatch>(row, begin, [&](int i) {
          const Pair divergence = compare(student[i], teacher[i]);
          batch_loss += Loss::loss(student[i], teacher[i], divergence);
          sum.student += student[i] * divergence.student;
          sum.teacher += teacher[i] * divergence.teacher;
        });
        loss_sum += batch_loss;
        student_sum += sum.student;
        teacher_sum += sum.teacher;
      });
      loss += static_cast<float>(loss_sum);
      if (problem.student_grad_unscaled.data != nullptr || problem.teacher_grad_unscaled.data != nullptr) {
        const Pair mean{
            static_cast<float>(reduce(student_sum, row.team, Sum())), static_cast<float>(reduce(teacher_sum, row.team, Sum()))};
        pass([&](int begin) {
          for_each_class<kBatch>(row, begin, [&](int i) {
            const Pair divergence = compare(student[i], teacher[i]);
            const Pair gradient = Loss::gradient(student[i], teacher[i], divergence, mean);
            student[i] = gradient.student * inverse_temperature;
            teacher[i] = gradient.teacher * inverse_temperature;
          });
          store_gradients(problem, row, begin, student, teacher);
        });
      }
    }
    if (problem.results.agreement != nullptr) {
      agreements += top_classes_agree(best_student, best_teacher, row);
    }
  });
  write_results(problem, loss, agreements);
}

// ---- Host code

// Threads per row. Where the class stride is smaller than the row stride, a row is spread over enough threads to hold it in a
// few registers each; otherwise adjacent threads process adjacent rows.
int team_of(const Shape& shape, const View& logits) {
  const int64_t rows = shape.images * shape.pixels;
  const int64_t row_stride = shape.pixels > 1 ? logits.pixel : logits.image;
  if (rows > 1 && logits.channel >= row_stride) {
    return 1;
  }
  int team = 1;
  while (team < 32 && team < shape.channels) {
    team *= 2;
  }
  return shape.channels <= 32 * 8 ? team : kThreads;
}

template <typename Loss>
auto kernel_of(int classes, int team) -> void (*)(Problem) {
  const int per_thread = (classes + team - 1) / team;
  return per_thread <= 1    ? register_kernel<Loss, 1>
         : per_thread <= 8  ? register_kernel<Loss, 8>
         : per_thread <= 16 ? register_kernel<Loss, 16>
         : per_thread <= 32 ? register_kernel<Loss, 32>
                            : streamed_kernel<Loss>;
}

template <typename Loss>
void launch(const Launcher& launcher, Problem& problem, const Tensor& like) {
  const int64_t teams = kThreads / problem.team;
  const int64_t blocks = std::clamp<int64_t>((problem.rows + teams - 1) / teams, 1, kMaxBlocks);
  const Tensor partials = torch::stable::new_empty(like, {blocks, 2}, ScalarType::Double);
  problem.partials = static_cast<double2*>(partials.mutable_data_ptr());
  launcher(kernel_of<Loss>(problem.classes, problem.team), blocks, kThreads, problem);
  if (blocks > 1) {
    launcher(total_kernel, 1, kThreads, problem.partials, static_cast<int>(blocks), problem.results);
  }
}

// Returns (loss, student gradient, teacher gradient, agreement); gradients are not scaled, outputs not requested are empty.
template <typename Loss>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& student,
    const Tensor& teacher,
    double temperature,
    double scale,
    bool student_requires_grad,
    bool teacher_requires_grad,
    bool agreement) {
  const Shape shape = shape_of(student);
  const auto sizes = student.sizes();
  STD_TORCH_CHECK(
      teacher.dim() == student.dim() && std::equal(sizes.begin(), sizes.end(), teacher.sizes().begin()),
      "student and teacher logits differ in shape");
  STD_TORCH_CHECK(shape.channels <= INT32_MAX - kBatch * kThreads, "too many classes: ", shape.channels);
  const auto empty = [&](bool enabled, ScalarType dtype) {
    return torch::stable::new_empty(student, enabled ? std::vector<int64_t>{} : std::vector<int64_t>{0}, dtype);
  };
  const auto empty_grad = [&](const Tensor& logits, bool enabled) {
    const ScalarType dtype = std::is_same_v<Loss, L1> ? ScalarType::Char : logits.scalar_type();
    return enabled ? empty_like(logits, dtype) : empty(false, dtype);
  };
  const Tensor loss = empty(true, ScalarType::Float);
  const Tensor student_grad_unscaled = empty_grad(student, student_requires_grad);
  const Tensor teacher_grad_unscaled = empty_grad(teacher, teacher_requires_grad);
  const Tensor count = empty(agreement, ScalarType::Long);
  Problem problem{};
  problem.student = view_of(student, "student");
  problem.teacher = view_of(teacher, "teacher");
  if (student_requires_grad) {
    problem.student_grad_unscaled = view_of(student_grad_unscaled, std::is_same_v<Loss, L1> ? Dtype::kInt8 : problem.student.dtype);
  }
  if (teacher_requires_grad) {
    problem.teacher_grad_unscaled = view_of(teacher_grad_unscaled, problem.teacher.dtype);
  }
  problem.rows = shape.channels == 0 ? 0 : shape.images * shape.pixels;
  problem.pixels = shape.pixels;
  problem.classes = static_cast<int32_t>(shape.channels);
  problem.team = team_of(shape, problem.student);
  problem.inverse_temperature = static_cast<float>(1.0 / temperature);
  problem.results = {
      scale,
      static_cast<float*>(loss.mutable_data_ptr()),
      agreement ? static_cast<int64_t*>(count.mutable_data_ptr()) : nullptr};
  launch<Loss>(Launcher(student), problem, student);
  return {loss, student_grad_unscaled, teacher_grad_unscaled, count};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> l1_forward(
    const Tensor& student, const Tensor& teacher, double scale, bool requires_grad, bool agreement) {
  const auto [loss, sign, none, count] = forward<L1>(student, teacher, 1.0, scale, requires_grad, false, agreement);
  return {loss, sign, count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kl_forward(
    const Tensor& student,
    const Tensor& teacher,
    double temperature,
    double scale,
    bool student_requires_grad,
    bool teacher_requires_grad,
    bool agreement) {
  return forward<KullbackLeibler>(student, teacher, temperature, scale, student_requires_grad, teacher_requires_grad, agreement);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> js_forward(
    const Tensor& student,
    const Tensor& teacher,
    double temperature,
    double scale,
    bool student_requires_grad,
    bool teacher_requires_grad,
    bool agreement) {
  return forward<JensenShannon>(student, teacher, temperature, scale, student_requires_grad, teacher_requires_grad, agreement);
}

}  // namespace dfkd_fast
