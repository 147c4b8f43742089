// L1, Kullback-Leibler and Jensen-Shannon discrepancies of logits, with their gradients and the top-1 agreement.
//
// A row is the C logits of one sample or pixel. A team of adjacent threads processes it: one thread where pixels are
// contiguous in memory, up to a warp where classes are, a block for long rows; most rows of few classes are read through shared
// memory (dense_rows.cuh). Rows that fit are held in registers, so that logits are read once; longer rows are read once per
// pass. Losses are accumulated in float64: one partial sum per block and a second kernel that adds them in order, so that results
// are bitwise reproducible.

#include "operators.h"

#include "dense_rows.cuh"
#include "discrepancy.cuh"
#include "images.cuh"
#include "launch.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace dfkd_fast {
namespace {

constexpr int kBatch = 8;  // classes that a thread loads at once from a row that does not fit into registers

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
  double loss = 0;
  int agreements = 0;
  for_each_row(problem, [&](const Row& row) {
    float student[kPerThread];
    float teacher[kPerThread];
    load_share(problem.student, row, 0, student);
    load_share(problem.teacher, row, 0, teacher);
    loss += compare_row<Loss>(problem, row, student, teacher, agreements);
    if constexpr (!std::is_same_v<Loss, L1>) {
      store_gradients(problem, row, 0, student, teacher);
    } else if (problem.student_grad_unscaled.data != nullptr) {
      store_share_as<int8_t>(problem.student_grad_unscaled, row, 0, student);
    }
  });
  write_results<kThreads>(problem, loss, agreements);
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
  double loss = 0;
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
        float batch_loss = 0.0f;
        for_each_class<kBatch>(row, begin, [&](int i) {
          batch_loss += L1::loss(student[i], teacher[i]);
          student[i] = L1::gradient(student[i], teacher[i]);
        });
        loss += batch_loss;
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
        loss += batch_loss;
        student_sum += sum.student;
        teacher_sum += sum.teacher;
      });
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
  write_results<kThreads>(problem, loss, agreements);
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
auto dense_kernel_of(int classes) -> void (*)(Problem, Sides) {
  return classes <= 8    ? dense_kernel<Loss, 8>
         : classes <= 12 ? dense_kernel<Loss, 12>
         : classes <= 16 ? dense_kernel<Loss, 16>
         : classes <= 24 ? dense_kernel<Loss, 24>
                         : dense_kernel<Loss, 32>;
}

// Launches a kernel that processes `tiles` in a grid-stride loop, and adds its partial sums.
template <typename... Parameters, typename... Arguments>
void launch(
    const Launcher& launcher,
    void (*kernel)(Problem, Parameters...),
    int64_t tiles,
    int threads,
    Problem& problem,
    const Tensor& like,
    const Arguments&... arguments) {
  // A second tile takes a block about as long as the second kernel: one latency of memory and one of the computation, together
  // about 2 us, against a launch, a latency of memory and a reduction.
  const int64_t blocks = tiles <= 2 ? 1 : launcher.resident_blocks(kernel, tiles, threads);
  const Tensor partials = torch::stable::new_empty(like, {blocks == 1 ? 0 : blocks, 2}, ScalarType::Double);
  problem.partials = static_cast<double2*>(partials.mutable_data_ptr());
  launcher(kernel, blocks, threads, problem, arguments...);
  if (blocks > 1) {
    launcher(total_kernel, 1, kThreads, problem.partials, static_cast<int>(blocks), problem.results);
  }
}

void launch_flat(const Launcher& launcher, int64_t count, Problem& problem, const Tensor& like) {
  const bool aligned =
      is_aligned(problem.student.data, 16) && is_aligned(problem.teacher.data, 16) && is_aligned(problem.student_grad_unscaled.data, 16);
  constexpr int64_t kPerBlock = kFlatThreads * kFlatVector;
  launch(launcher, flat_l1_kernel, (count + kPerBlock - 1) / kPerBlock, kFlatThreads, problem, like, count, aligned);
}

template <typename Loss>
void launch_rows(const Launcher& launcher, const Shape& shape, Problem& problem, const Tensor& like) {
  if (const std::optional<Sides> sides = sides_of(problem, shape)) {
    const int threads = problem.classes <= 16 ? kTileRows<16> : kTileRows<32>;
    launch(launcher, dense_kernel_of<Loss>(problem.classes), sides->tiles, threads, problem, like, *sides);
    return;
  }
  problem.team = team_of(shape, problem.student);
  const int64_t teams = kThreads / problem.team;
  launch(launcher, kernel_of<Loss>(problem.classes, problem.team), (problem.rows + teams - 1) / teams, kThreads, problem, like);
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
  problem.inverse_temperature = static_cast<float>(1.0 / temperature);
  problem.results = {
      scale,
      static_cast<float*>(loss.mutable_data_ptr()),
      agreement ? static_cast<int64_t*>(count.mutable_data_ptr()) : nullptr};
  const Launcher launcher(student);
  const bool flat = std::is_same_v<Loss, L1> && !agreement && is_dense(student) && have_same_offsets(problem.student, problem.teacher) &&
                    (!student_requires_grad || have_same_offsets(problem.student, problem.student_grad_unscaled));
  if (flat) {
    launch_flat(launcher, shape.count(), problem, student);
  } else {
    launch_rows<Loss>(launcher, shape, problem, student);
  }
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
