// Calls of the core: every member, with kernels that are given and that are generated, type, layout and
// level, on sizes that divide by nothing, from several threads at once. Built and run under sanitizers by
// `make sanitize`, without one by `make test-arm`; prints nothing but its last line.
//
// Tensors lie in memory of exactly their size, so that whatever reads or writes beside them is
// reported, and hold NaN where a result must be written.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "involution.h"

namespace {

using Size = std::int64_t;

struct Call {
  Size numbers[INVOLUTION_NUMBERS];
  Size batch;
  Size x, kernel, y;  // numbers of elements
};

Call draw(std::mt19937& random, Size type) {
  const auto any = [&](std::initializer_list<Size> values) {
    return values.begin()[random() % values.size()];
  };
  Call c;
  Size* n = c.numbers;
  n[1] = type;
  n[2] = any({0, 1});
  n[3] = any({0, 1});
  const Size groups = any({1, 2, 3, 4, 5, 8, 16, 17}), members = any({1, 2, 3, 4, 5, 8, 16, 17, 33});
  n[4] = groups * members;
  n[5] = groups;
  const int rank = static_cast<int>(random() % 3) + 1;
  Size in = 1, out = 1, taps = 1;
  for (int i = 0; i < 3; ++i) {
    const bool there = i >= 3 - rank;
    Size size, kernel, stride, dilation, pads, results;
    do {
      size = there ? any({0, 1, 2, 3, 5, 7, 9, 17, 33}) : 1;
      kernel = there ? any({1, 2, 3, 4, 7}) : 1;
      stride = there ? any({1, 1, 2, 3}) : 1;
      dilation = there ? any({1, 1, 2, 3, 19, 1000000007}) : 1;
      const Size span = (kernel - 1) * dilation;
      pads = there ? span / 2 + any({0, 0, 0, 1, 3}) : 0;
      results = (size + 2 * pads - span - 1) / stride + 1;
    } while (results < 1 || size + 2 * pads < (kernel - 1) * dilation + 1);
    n[6 + i] = size, n[9 + i] = results, n[12 + i] = kernel;
    n[15 + i] = stride, n[18 + i] = dilation, n[21 + i] = pads;
    in *= size, out *= results, taps *= kernel;
  }
  c.batch = any({0, 1, 2, 3});
  c.x = c.batch * in * n[4];
  c.y = c.batch * out * n[4];
  c.kernel = c.batch * out * taps * groups;
  return c;
}

// Bytes, so that the end is exact; the pattern is some small number in every type.
std::vector<unsigned char> filled(Size count, Size type, unsigned char byte) {
  const Size bytes = type == 0 ? 8 : type == 1 ? 4 : 2;
  std::vector<unsigned char> memory(static_cast<std::size_t>(count * bytes), byte);
  memory.shrink_to_fit();
  return memory;
}

// Whether every element was written; what is computed here is finite.
bool written(const std::vector<unsigned char>& memory, Size type) {
  const std::size_t bytes = type == 0 ? 8 : type == 1 ? 4 : 2;
  const std::vector<unsigned char> untouched(bytes, 0xff);
  for (std::size_t n = 0; n < memory.size(); n += bytes)
    if (std::equal(untouched.begin(), untouched.end(), memory.begin() + static_cast<Size>(n)))
      return false;
  return true;
}

bool run(const Call& call, int threads) {
  const Size type = call.numbers[1];
  const auto x = filled(call.x, type, 0x3c), kernel = filled(call.kernel, type, 0x3b);
  const auto y = filled(call.y, type, 0x3a);
  const std::vector<unsigned char>*const arguments[3][2] = {{&x, &kernel}, {&kernel, &y}, {&x, &y}};
  const Size results[3] = {call.y, call.x, call.kernel};
  for (int member = 0; member < 3; ++member) {
    Call c = call;
    c.numbers[0] = member;
    auto once = filled(results[member], type, 0xff), again = once;
    for (auto* result : {&once, &again})
      if (involution_run(c.numbers, c.batch, result == &once ? threads : 1,
                         arguments[member][0]->data(), arguments[member][1]->data(),
                         result->data()))
        return false;
    // The same bits, whatever the number of threads.
    if (once != again || !written(once, type)) return false;
  }
  return true;
}

// The same with kernels that are generated: channels are last.
bool run_fused(const Call& call, Size hidden_channels, int threads) {
  const Size type = call.numbers[1], channels = call.numbers[4];
  const Size columns = call.numbers[12] * call.numbers[13] * call.numbers[14] * call.numbers[5];
  const Size places = call.y / channels;
  const auto x = filled(call.x, type, 0x3c), y = filled(call.y, type, 0x3a);
  const auto hidden = filled(places * hidden_channels, type, 0x3b);
  const auto weight = filled(hidden_channels * columns, type, 0x39);
  const auto bias = filled(columns, type, 0x38);
  const std::vector<unsigned char>*const arguments[3][4] = {
      {&x, &hidden, &weight, &bias}, {&hidden, &weight, &bias, &y}, {&x, &hidden, &weight, &y}};
  const Size results[3] = {call.y, call.x, places * hidden_channels};
  const Size sums = call.batch * (hidden_channels + 1) * columns;
  for (int member = 0; member < 3; ++member) {
    Size numbers[INVOLUTION_FUSED_NUMBERS];
    std::copy(call.numbers, call.numbers + INVOLUTION_NUMBERS, numbers);
    numbers[0] = member, numbers[2] = 0, numbers[INVOLUTION_NUMBERS] = hidden_channels;
    auto once = filled(results[member], type, 0xff), again = once;
    auto sums_once = filled(member == 2 ? sums : 0, type == 0 ? 0 : 1, 0xff), sums_again = sums_once;
    if (involution_run_fused(numbers, call.batch, threads, arguments[member][0]->data(),
                             arguments[member][1]->data(), arguments[member][2]->data(),
                             arguments[member][3]->data(), once.data(), sums_once.data()) ||
        involution_run_fused(numbers, call.batch, 1, arguments[member][0]->data(),
                             arguments[member][1]->data(), arguments[member][2]->data(),
                             arguments[member][3]->data(), again.data(), sums_again.data()))
      return false;
    if (once != again || sums_once != sums_again) return false;
    if (!written(once, type) || !written(sums_once, type == 0 ? 0 : 1)) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 200;
  int done = 0;
  for (int level = 0; involution_level(level) != nullptr; ++level) {
    involution_use_level(level);
    std::vector<std::thread> callers;
    std::vector<int> failures(4, 0);
    for (int caller = 0; caller < 4; ++caller)
      callers.emplace_back([&, caller] {
        std::mt19937 random(static_cast<unsigned>(1000 * level + caller));
        for (int i = 0; i < calls; ++i) {
          const Call call = draw(random, i % 4);
          const Size hidden_channels[] = {1, 2, 3, 8, 16, 17, 33};
          if (!run(call, 1 + i % 8) || !run_fused(call, hidden_channels[i % 7], 1 + i % 8))
            ++failures[caller];
        }
      });
    for (auto& caller : callers) caller.join();
    for (int n : failures)
      if (n != 0) {
        std::printf("%d calls went wrong at level %s\n", n, involution_level(level));
        return 1;
      }
    done += 4 * calls;
  }
  std::printf("%d calls, each with its gradients, and with kernels that are generated: no report\n", done);
  return 0;
}
