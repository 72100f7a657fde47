// Calls of the core: every pass, fused and unfused, data type, layout and target, with sizes that
// are not multiples of the vector width, from several threads at once. Run under sanitizers by
// `make sanitize`, without them by `make test-arm`; prints one line.
//
// Buffers have exactly the size of their tensors, so that sanitizers report out-of-bounds accesses,
// and results start as NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "params.h"

namespace {

using index_t = std::int64_t;

struct Call {
  InvolutionParams params;
  index_t batch;
  index_t x, kernel, y;  // numbers of elements
};

Call draw(std::mt19937& random, index_t type) {
  const auto any = [&](std::initializer_list<index_t> values) {
    return values.begin()[random() % values.size()];
  };
  Call c = {};
  InvolutionParams& p = c.params;
  p.dtype = type;
  p.channels_first = any({0, 1});
  p.interleaved = any({0, 1});
  const index_t groups = any({1, 2, 3, 4, 5, 8, 16, 17});
  const index_t channels_per_group = any({1, 2, 3, 4, 5, 8, 16, 17, 33});
  p.channels = groups * channels_per_group;
  p.groups = groups;
  const int rank = static_cast<int>(random() % 3) + 1;
  index_t in = 1, out = 1, taps = 1;
  for (int i = 0; i < 3; ++i) {
    const bool exists = i >= 3 - rank;
    index_t size, kernel, stride, dilation, pad, output;
    do {
      size = exists ? any({0, 1, 2, 3, 5, 7, 9, 17, 33}) : 1;
      kernel = exists ? any({1, 2, 3, 4, 5, 7}) : 1;
      stride = exists ? any({1, 1, 2, 3}) : 1;
      dilation = exists ? any({1, 1, 2, 3, 19, 1000000007}) : 1;
      const index_t span = (kernel - 1) * dilation;
      pad = exists ? span / 2 + any({0, 0, 0, 1, 3, 11}) : 0;
      output = (size + 2 * pad - span - 1) / stride + 1;
    } while (output < 1 || size + 2 * pad < (kernel - 1) * dilation + 1);
    p.input_size[i] = size, p.output_size[i] = output, p.kernel_size[i] = kernel;
    p.strides[i] = stride, p.dilation_rate[i] = dilation, p.pad_before[i] = pad;
    p.upsampling[i] = exists && stride == 1 ? any({1, 1, 1, 2, 3}) : 1;
    output *= p.upsampling[i];
    p.output_size[i] = output;
    in *= size, out *= output, taps *= kernel;
  }
  c.batch = any({0, 1, 2, 3});
  c.x = c.batch * in * p.channels;
  c.y = c.batch * out * p.channels;
  c.kernel = c.batch * out * taps * groups;
  return c;
}

// Exactly as many bytes as the tensor; a repeated byte below 0x40 is a small number in every type.
std::vector<unsigned char> filled(index_t count, index_t type, unsigned char byte) {
  const index_t bytes = type == 0 ? 8 : type == 1 ? 4 : 2;
  std::vector<unsigned char> memory(static_cast<std::size_t>(count * bytes), byte);
  memory.shrink_to_fit();
  return memory;
}

// Whether every element was written: results are finite, so none has the bytes 0xff.
bool written(const std::vector<unsigned char>& memory, index_t type) {
  const std::size_t bytes = type == 0 ? 8 : type == 1 ? 4 : 2;
  const std::vector<unsigned char> untouched(bytes, 0xff);
  for (std::size_t n = 0; n < memory.size(); n += bytes)
    if (std::equal(untouched.begin(), untouched.end(), memory.begin() + static_cast<index_t>(n)))
      return false;
  return true;
}

bool run(const Call& call, int threads) {
  const index_t type = call.params.dtype;
  const auto x = filled(call.x, type, 0x3c), kernel = filled(call.kernel, type, 0x3b);
  const auto y = filled(call.y, type, 0x3a);
  const std::vector<unsigned char>* const arguments[3][2] = {
      {&x, &kernel}, {&kernel, &y}, {&x, &y}};
  const index_t results[3] = {call.y, call.x, call.kernel};
  for (int pass = 0; pass < 3; ++pass) {
    InvolutionParams params = call.params;
    params.pass = pass;
    auto once = filled(results[pass], type, 0xff), again = once;
    for (auto* result : {&once, &again})
      if (involution_execute(&params, call.batch, result == &once ? threads : 1,
                             arguments[pass][0]->data(), arguments[pass][1]->data(),
                             result->data()))
        return false;
    // Results do not depend on the number of threads.
    if (once != again || !written(once, type)) return false;
  }
  return true;
}

// A framework's parallel loop: its threads take the tasks in turn.
void run_on_threads(void* context, index_t tasks, void (*task)(void*, index_t), void* argument) {
  const int threads = *static_cast<const int*>(context);
  std::vector<std::thread> workers;
  for (int worker = 0; worker < threads; ++worker)
    workers.emplace_back([=] {
      for (index_t n = worker; n < tasks; n += threads) task(argument, n);
    });
  for (std::thread& worker : workers) worker.join();
}

// The same for fused passes.
bool run_fused(const Call& call, index_t hidden_channels, int threads) {
  const index_t type = call.params.dtype, channels = call.params.channels;
  const index_t* const kernel_size = call.params.kernel_size;
  const index_t columns = kernel_size[0] * kernel_size[1] * kernel_size[2] * call.params.groups;
  const index_t positions = call.y / channels;
  const auto x = filled(call.x, type, 0x3c), y = filled(call.y, type, 0x3a);
  const auto hidden = filled(positions * hidden_channels, type, 0x3b);
  const auto weight = filled(hidden_channels * columns, type, 0x39);
  const auto bias = filled(columns, type, 0x38);
  const std::vector<unsigned char>* const arguments[3][4] = {
      {&x, &hidden, &weight, &bias}, {&hidden, &weight, &bias, &y}, {&x, &hidden, &weight, &y}};
  const index_t results[3] = {call.y, call.x, positions * hidden_channels};
  const index_t dweights = call.batch * (hidden_channels + 1) * columns;
  const index_t acc_type = type == 0 ? 0 : 1;
  for (int pass = 0; pass < 3; ++pass) {
    InvolutionParams params = call.params;
    params.pass = pass, params.hidden_channels = hidden_channels;
    auto once = filled(results[pass], type, 0xff), again = once;
    auto dweights_once = filled(pass == 2 ? dweights : 0, acc_type, 0xff);
    auto dweights_again = dweights_once;
    const auto execute = [&](int threads, auto& result, auto& second) {
      return involution_execute_fused(&params, call.batch, threads, arguments[pass][0]->data(),
                                      arguments[pass][1]->data(), arguments[pass][2]->data(),
                                      arguments[pass][3]->data(), result.data(), second.data());
    };
    if (execute(threads, once, dweights_once) || execute(1, again, dweights_again)) return false;
    if (once != again || dweights_once != dweights_again) return false;
    if (!written(once, type) || !written(dweights_once, acc_type)) return false;
  }
  InvolutionParams params = call.params;
  params.hidden_channels = hidden_channels;
  const auto scale = filled(channels, type, 0x3b), offset = filled(channels, type, 0x3a);
  auto once = filled(call.y, type, 0xff), again = once;
  const auto execute = [&](auto& result) {
    return involution_execute_fused_scaled(&params, call.batch, threads, x.data(), hidden.data(),
                                           weight.data(), bias.data(), scale.data(), offset.data(),
                                           hidden_channels % 2, result.data());
  };
  if (execute(once)) return false;
  involution_set_parallel_for(&run_on_threads, &threads);
  const bool failed = execute(again);
  involution_set_parallel_for(nullptr, nullptr);
  if (failed || once != again || !written(once, type)) return false;
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 200;
  int done = 0;
  for (int target = 0; involution_target(target) != nullptr; ++target) {
    involution_set_target(target);
    std::vector<std::thread> callers;
    std::vector<int> failures(4, 0);
    for (int caller = 0; caller < 4; ++caller)
      callers.emplace_back([&, caller] {
        std::mt19937 random(static_cast<unsigned>(1000 * target + caller));
        for (int i = 0; i < calls; ++i) {
          const Call call = draw(random, i % 4);
          const index_t hidden_channels[] = {1, 2, 3, 8, 16, 17, 33};
          if (!run(call, 1 + i % 8) || !run_fused(call, hidden_channels[i % 7], 1 + i % 8))
            ++failures[caller];
        }
      });
    for (auto& caller : callers) caller.join();
    for (int n : failures)
      if (n != 0) {
        std::printf("%d calls failed on target %s\n", n, involution_target(target));
        return 1;
      }
    done += 4 * calls;
  }
  std::printf("%d calls of all passes, fused and unfused: passed\n", done);
  return 0;
}
