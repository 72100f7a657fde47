// onnxruntime: a library of custom operators, forward only, for float32 with the channels first. It
// runs on the threads of the session.
//
//    involution::Involution(x, kernel) -> y
//    involution::FusedInvolution(x, hidden, weight, bias) -> y
//    involution::FusedInvolution(x, hidden, weight, bias, scale, offset) -> y
//
// with x (batch, channels, *spatial), kernel (batch, taps, groups, *output), hidden (batch, hidden
// channels, *output), weight (hidden channels, taps * groups) and bias (taps * groups). With scale
// and offset, both (channels), the output is y * scale + offset. Attributes are integers: of ONNX's
// Conv, kernel_shape (required), strides, dilations, pads and group; and same (1: the pads of
// auto_pad SAME_UPPER), upsampling, interleaved (1: channel c is in group c % group), relu (1, with
// scale and offset: 0 for outputs below 0).
#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort_api.h"
#include "params.h"

namespace {

namespace ort = involution::ort;
using Ints = std::vector<std::int64_t>;

constexpr std::int64_t UNKNOWN = -1;
// Positions and their sums are 64-bit integers.
constexpr std::int64_t MAX_SIZE = std::int64_t{1} << 40;
constexpr std::size_t MAX_RANK = 3;

// The rule that a node or its inputs break; becomes a status.
struct InvalidNode {
  std::string message;
};

// The status of a failed call of onnxruntime's API.
struct ApiFailure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status != nullptr) throw ApiFailure{status};
}

// Calls a function that throws the above, and returns its status.
template <class Fn>
ort::Status* guard(const ort::Api* api, Fn fn) try {
  fn();
  return nullptr;
} catch (const ApiFailure& failure) {
  return failure.status;
} catch (const InvalidNode& error) {
  return ort::create_status(api, ort::INVALID_ARGUMENT, ("involution: " + error.message).c_str());
} catch (const std::bad_alloc&) {
  return ort::create_status(api, ort::FAIL, "involution: out of memory");
} catch (const std::exception& error) {
  return ort::create_status(api, ort::FAIL, (std::string("involution: ") + error.what()).c_str());
}

std::string text(const Ints& values) {
  std::string list = "(";
  for (const std::int64_t value : values)
    list += (list.size() > 1 ? ", " : "") + (value == UNKNOWN ? "?" : std::to_string(value));
  return list + ")";
}

bool succeeded(const ort::Api* api, ort::Status* status) {
  if (status == nullptr) return true;
  ort::release_status(api, status);
  return false;
}

// An attribute of a node, an integer or several; empty if the node has none of this name.
Ints read_attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name) {
  std::size_t size = 0;
  std::int64_t value = 0;
  if (succeeded(api, ort::get_int(api, info, name, &value))) return {value};
  if (succeeded(api, ort::get_ints(api, info, name, nullptr, &size)) && size > 0) {
    Ints values(size);
    check(ort::get_ints(api, info, name, values.data(), &size));
    return values;
  }
  // An attribute of another type, or none.
  float number = 0;
  bool exists = succeeded(api, ort::get_float(api, info, name, &number));
  size = 0;
  succeeded(api, ort::get_floats(api, info, name, nullptr, &size));
  exists = exists || size > 0;
  size = 0;
  succeeded(api, ort::get_string(api, info, name, nullptr, &size));
  exists = exists || size > 0;
  if (exists) throw InvalidNode{"`" + std::string(name) + "` must consist of integers"};
  return {};
}

// The same while a session is being created.
Ints read_attribute(const ort::Api* api, const ort::ShapeContext* context, const char* name) {
  const ort::Attribute* attribute = nullptr;
  if (!succeeded(api, ort::find_attribute(api, context, name, &attribute))) return {};
  Ints values(2 * MAX_RANK + 1);
  std::size_t bytes = 0;
  for (const ort::AttributeType type : {ort::INTS, ort::INT})
    if (succeeded(api, ort::read_attribute(api, attribute, type, values.data(),
                                           values.size() * sizeof(values[0]), &bytes)) &&
        bytes > 0) {
      values.resize(bytes / sizeof(values[0]));
      return values;
    }
  throw InvalidNode{"`" + std::string(name) + "` must be an integer, or at most " +
                    std::to_string(2 * MAX_RANK) + " of them"};
}

// The product of two positive numbers, which must not overflow in those that are made of it.
std::int64_t multiply(std::int64_t a, std::int64_t b) {
  if (a > MAX_SIZE / b)
    throw InvalidNode{"The number of taps, groups and outputs must be smaller. Received: " +
                      std::to_string(a) + " times " + std::to_string(b)};
  return a * b;
}

// The attributes of a node, checked.
class Window {
 public:
  template <class Source>
  Window(const ort::Api* api, const Source* source) {
    const auto read = [&](const char* name, std::size_t count, std::int64_t fallback,
                          std::int64_t low, std::int64_t high = MAX_SIZE) {
      Ints values = read_attribute(api, source, name);
      if (values.empty()) values.assign(count, fallback);
      if (values.size() != count)
        throw InvalidNode{"`" + std::string(name) + "` must have " + std::to_string(count) +
                          " integers. Received: " + text(values)};
      for (const std::int64_t value : values)
        if (value < low || value > high)
          throw InvalidNode{"`" + std::string(name) + "` must be from " + std::to_string(low) +
                            " to " +
                            std::to_string(high) + ". Received: " + text(values)};
      return values;
    };
    kernel_shape = read_attribute(api, source, "kernel_shape");
    if (kernel_shape.empty() || rank() > MAX_RANK)
      throw InvalidNode{"`kernel_shape` must have one, two or three integers. Received: " +
                        text(kernel_shape)};
    kernel_shape = read("kernel_shape", rank(), 1, 1, std::int64_t{1} << 20);
    strides = read("strides", rank(), 1, 1);
    dilations = read("dilations", rank(), 1, 1);
    pads = read("pads", 2 * rank(), 0, 0);
    upsampling = read("upsampling", rank(), 1, 1);
    groups = read("group", 1, 1, 1)[0];
    same = read("same", 1, 0, 0, 1)[0] == 1;
    if (same && !read_attribute(api, source, "pads").empty())
      throw InvalidNode{"`pads` must be absent where `same` is 1"};
    interleaved = read("interleaved", 1, 0, 0, 1)[0] == 1;
    relu = read("relu", 1, 0, 0, 1)[0] == 1;
    for (std::size_t i = 0; i < rank(); ++i) {
      if (kernel_shape[i] - 1 > MAX_SIZE / dilations[i])
        throw InvalidNode{"A window must be smaller. Received: kernel_shape " + text(kernel_shape) +
                          ", dilations " + text(dilations)};
      for (const std::int64_t stride : strides)
        if (upsampling[i] > 1 && stride > 1)
          throw InvalidNode{"`strides` must be 1 where `upsampling` is above 1. Received: " +
                            text(strides) + ", " + text(upsampling)};
    }
    taps = 1;
    for (const std::int64_t n : kernel_shape) taps = multiply(taps, n);
    multiply(taps, groups);
  }

  std::size_t rank() const { return kernel_shape.size(); }

  std::int64_t pad_before(std::size_t i, std::int64_t size) const {
    return same ? same_padding(i, size) / 2 : pads[i];
  }

  // The output's size for a size of the input; unknown if that is.
  std::int64_t output_size(std::size_t i, std::int64_t size) const {
    if (size == UNKNOWN) return UNKNOWN;
    if (size < 1 || size > MAX_SIZE)
      throw InvalidNode{"A size must be from 1 to " + std::to_string(MAX_SIZE) +
                        ". Received: " + std::to_string(size)};
    const std::int64_t padding = same ? same_padding(i, size) : pads[i] + pads[rank() + i];
    if (size + padding <= span(i))
      throw InvalidNode{"The window must fit into the padded input. Received: an extent of " +
                        std::to_string(span(i) + 1) + " for a size of " + std::to_string(size) +
                        ", padded by " + std::to_string(padding)};
    return multiply((size + padding - span(i) - 1) / strides[i] + 1, upsampling[i]);
  }

  // Whether output and input have the same size for every size of the input.
  bool preserves_size(std::size_t i) const {
    return strides[i] == 1 && upsampling[i] == 1 &&
           (same || pads[i] + pads[rank() + i] == span(i));
  }

  Ints kernel_shape, strides, dilations, pads, upsampling;
  std::int64_t groups, taps;
  bool same, interleaved, relu;

 private:
  // Distance of the last tap from the first.
  std::int64_t span(std::size_t i) const { return (kernel_shape[i] - 1) * dilations[i]; }

  std::int64_t same_padding(std::size_t i, std::int64_t size) const {
    const std::int64_t windows = (size - 1) / strides[i] + 1;
    return std::max<std::int64_t>((windows - 1) * strides[i] + span(i) + 1 - size, 0);
  }
};

// The operators; each CustomOp is one of them.
struct Operator {
  const char* name;
  std::size_t inputs;  // required ones
  std::size_t optional_inputs;
};
constexpr Operator UNFUSED = {"Involution", 2, 0}, FUSED = {"FusedInvolution", 4, 2};
constexpr std::size_t MAX_INPUTS = 6;

// Throws unless the inputs of a node have the shapes that the first one demands; unknown sizes, and
// empty shapes, which are unknown, are not compared. Returns the output's shape.
Ints check_shapes(const Operator& op, const Window& window, const std::vector<Ints>& shapes) {
  const std::size_t rank = window.rank();
  const Ints& x = shapes[0];
  if (x.size() != rank + 2)
    throw InvalidNode{"`x` must have a batch axis, a channel axis and as many spatial axes as "
                      "`kernel_shape` has integers, " +
                      std::to_string(rank) + ". Received: x of shape " + text(x)};
  if (x[1] != UNKNOWN && (x[1] == 0 || x[1] % window.groups != 0))
    throw InvalidNode{"`group` must divide the number of channels. Received: group " +
                      std::to_string(window.groups) + ", x of shape " + text(x)};
  Ints output = {x[0], x[1]};
  for (std::size_t i = 0; i < rank; ++i) output.push_back(window.output_size(i, x[i + 2]));
  const auto expect = [&](std::size_t index, const char* name, const Ints& wanted) {
    const Ints& found = shapes[index];
    bool equal = found.empty() || found.size() == wanted.size();
    for (std::size_t i = 0; equal && i < found.size(); ++i)
      equal = found[i] == wanted[i] || found[i] == UNKNOWN || wanted[i] == UNKNOWN;
    if (!equal)
      throw InvalidNode{"`" + std::string(name) + "` must have the shape " + text(wanted) +
                        " for x of shape " + text(x) + ". Received: " + text(found)};
  };
  const auto at_outputs = [&](Ints channels) {
    channels.insert(channels.begin(), output[0]);
    channels.insert(channels.end(), output.begin() + 2, output.end());
    return channels;
  };
  if (&op == &UNFUSED) {
    expect(1, "kernel", at_outputs({window.taps, window.groups}));
    return output;
  }
  const std::int64_t hidden = shapes[2].empty() ? UNKNOWN : shapes[2][0];
  if (hidden == 0)
    throw InvalidNode{"`weight` must have a row for each hidden channel, at least one"};
  expect(1, "hidden", at_outputs({hidden}));
  expect(2, "weight", {hidden, window.taps * window.groups});
  expect(3, "bias", {window.taps * window.groups});
  if (shapes.size() == op.inputs && !window.relu) return output;
  if (shapes.size() != op.inputs + op.optional_inputs)
    throw InvalidNode{"`scale` and `offset` are required together, and where `relu` is 1"};
  expect(4, "scale", {x[1]});
  expect(5, "offset", {x[1]});
  return output;
}

// A shape, empty if it is unknown, and if given, the names of its dimensions.
Ints read_shape(const ort::Api* api, const ort::TensorInfo* info,
                std::vector<const char*>* names = nullptr) {
  std::size_t axes = 0;
  check(ort::dimension_count(api, info, &axes));
  Ints shape(axes);
  check(ort::get_dimensions(api, info, shape.data(), axes));
  if (names == nullptr) return shape;
  names->resize(axes);
  check(ort::get_symbols(api, info, names->data(), axes));
  return shape;
}

// Information that onnxruntime allocates; released also where a function throws.
template <class Info>
class Owned {
 public:
  Owned(const ort::Api* api, void (*release)(const ort::Api*, Info*))
      : api_(api), release_(release) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (info != nullptr) release_(api_, info);
  }
  Info* info = nullptr;

 private:
  const ort::Api* const api_;
  void (*const release_)(const ort::Api*, Info*);
};

void release(const ort::Api* api, ort::TensorInfo* info) { ort::release_tensor_info(api, info); }
void release(const ort::Api* api, ort::TypeInfo* info) { ort::release_type_info(api, info); }

struct Kernel {
  const ort::Api* api;
  const Operator* op;
  Window window;
};

Kernel* create_kernel(const ort::Api* api, const Operator& op, const ort::KernelInfo* info) {
  const Window window(api, info);
  std::vector<Ints> shapes;
  std::size_t inputs = 0;
  check(ort::info_input_count(api, info, &inputs));
  for (std::size_t i = 0; i < inputs; ++i) {
    Owned<ort::TypeInfo> type(api, &release);
    ort::Status* const status = ort::input_type(api, info, i, &type.info);
    // An optional input without a name.
    if (i >= op.inputs && !succeeded(api, status)) break;
    if (i < op.inputs) check(status);
    const ort::TensorInfo* tensor = nullptr;
    check(ort::as_tensor_info(api, type.info, &tensor));
    shapes.push_back(read_shape(api, tensor));
  }
  // onnxruntime ignores the errors of a shape inference.
  if (!shapes[0].empty()) check_shapes(op, window, shapes);
  return new Kernel{api, &op, window};
}

// onnxruntime as the core's parallel loop.
struct Loop {
  const ort::Api* api;
  const ort::KernelContext* context;
  ort::Status* status = nullptr;

  struct Job {
    void (*task)(void*, std::int64_t);
    void* argument;
    static void run(void* self, std::size_t n) {
      const Job& job = *static_cast<const Job*>(self);
      job.task(job.argument, static_cast<std::int64_t>(n));
    }
  };

  static void run(void* self, std::int64_t tasks, void (*task)(void*, std::int64_t),
                  void* argument) {
    Loop& loop = *static_cast<Loop*>(self);
    Job job = {task, argument};
    ort::Status* const status = ort::parallel_for(
        loop.api, loop.context, &Job::run, static_cast<std::size_t>(tasks), 0, &job);
    if (status == nullptr) return;
    if (loop.status == nullptr)
      loop.status = status;
    else
      ort::release_status(loop.api, status);
  }
};

// Sets the loop of this thread's calls of the core.
class LoopScope {
 public:
  explicit LoopScope(Loop& loop) { involution_set_parallel_for(&Loop::run, &loop); }
  LoopScope(const LoopScope&) = delete;
  ~LoopScope() { involution_set_parallel_for(nullptr, nullptr); }
};

void compute(const Kernel& kernel, ort::KernelContext* context) {
  const ort::Api* const api = kernel.api;
  const Window& window = kernel.window;
  const void* data[MAX_INPUTS] = {};
  std::vector<Ints> shapes;
  std::size_t inputs = 0;
  check(ort::input_count(api, context, &inputs));
  for (std::size_t i = 0; i < inputs; ++i) {
    const ort::Value* value = nullptr;
    check(ort::get_input(api, context, i, &value));
    if (value == nullptr && i >= kernel.op->inputs) break;
    Owned<ort::TensorInfo> tensor(api, &release);
    check(ort::tensor_info(api, value, &tensor.info));
    shapes.push_back(read_shape(api, tensor.info));
    if (shapes[i].empty()) throw InvalidNode{"Inputs must have axes. Received: a number"};
    check(ort::tensor_data(api, const_cast<ort::Value*>(value), const_cast<void**>(&data[i])));
  }
  const Ints output = check_shapes(*kernel.op, window, shapes);
  ort::Value* value = nullptr;
  void* result = nullptr;
  check(ort::get_output(api, context, 0, output.data(), output.size(), &value));
  check(ort::tensor_data(api, value, &result));

  InvolutionParams params = {};
  params.dtype = 1;  // float32
  params.channels_first = 1;
  params.interleaved = window.interleaved;
  params.channels = output[1];
  params.groups = window.groups;
  for (std::size_t i = 0, missing = MAX_RANK - window.rank(); i < MAX_RANK; ++i) {
    const bool exists = i >= missing;
    const std::size_t axis = i - missing;
    params.input_size[i] = exists ? shapes[0][axis + 2] : 1;
    params.output_size[i] = exists ? output[axis + 2] : 1;
    params.kernel_size[i] = exists ? window.kernel_shape[axis] : 1;
    params.strides[i] = exists ? window.strides[axis] : 1;
    params.dilation_rate[i] = exists && window.kernel_shape[axis] > 1 ? window.dilations[axis] : 1;
    params.pad_before[i] = exists ? window.pad_before(axis, params.input_size[i]) : 0;
    params.upsampling[i] = exists ? window.upsampling[axis] : 1;
  }
  // The session's loop has its own number of threads; this is the one that work is divided for.
  const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Loop loop = {api, context};
  const LoopScope scope(loop);
  int failed;
  if (kernel.op == &UNFUSED) {
    failed = involution_execute(&params, output[0], threads, data[0], data[1], result);
  } else {
    params.hidden_channels = shapes[2][0];
    failed = shapes.size() == FUSED.inputs
                 ? involution_execute_fused(&params, output[0], threads, data[0], data[1], data[2],
                                            data[3], result, nullptr)
                 : involution_execute_fused_scaled(&params, output[0], threads, data[0], data[1],
                                                   data[2], data[3], data[4], data[5],
                                                   window.relu, result);
  }
  check(loop.status);
  if (failed) throw std::bad_alloc();
}

// The shape of a node's output, while a session is being created.
void infer_shape(const ort::Api* api, const Operator& op, ort::ShapeContext* context) {
  const Window window(api, context);
  std::vector<Ints> shapes;
  std::vector<const char*> symbols;  // of the dimensions of x
  std::size_t inputs = 0;
  check(ort::shape_input_count(api, context, &inputs));
  for (std::size_t i = 0; i < inputs; ++i) {
    ort::TensorInfo* info = nullptr;  // owned by the context
    check(ort::input_info(api, context, i, &info));
    shapes.push_back(read_shape(api, info, i == 0 ? &symbols : nullptr));
  }
  if (shapes[0].empty()) return;
  Ints output = check_shapes(op, window, shapes);
  // A dimension without a size must have a name, which is equal only for equal dimensions.
  static std::atomic<std::int64_t> names{0};
  std::vector<std::string> storage(output.size());
  for (std::size_t i = 0; i < output.size(); ++i) {
    if (output[i] != UNKNOWN) continue;
    const bool same_as_x = i < 2 || window.preserves_size(i - 2);
    if (same_as_x && symbols[i] != nullptr) storage[i] = symbols[i];
    if (storage[i].empty()) storage[i] = "involution::size::" + std::to_string(names++);
  }
  for (std::size_t i = 0; i < output.size(); ++i) symbols[i] = storage[i].c_str();
  Owned<ort::TensorInfo> result(api, &release);
  check(ort::create_tensor_info(api, &result.info));
  check(ort::set_element_type(api, result.info, ort::FLOAT));
  check(ort::set_dimensions(api, result.info, output.data(), output.size()));
  check(ort::set_symbols(api, result.info, symbols.data(), symbols.size()));
  check(ort::set_output_info(api, context, 0, result.info));
}

// An operator as a copy of onnxruntime knows it; a process may have several copies.
struct RegisteredOp : ort::CustomOp {
  const ort::Api* api;
};

template <const Operator& kOperator>
RegisteredOp make_custom_op(const ort::Api* api) {
  RegisteredOp op = {};
  op.api = api;
  op.version = ort::VERSION;
  op.name = [](const ort::CustomOp*) { return kOperator.name; };
  op.execution_provider = [](const ort::CustomOp*) -> const char* {
    return "CPUExecutionProvider";
  };
  op.input_count = [](const ort::CustomOp*) {
    return kOperator.inputs + kOperator.optional_inputs;
  };
  op.output_count = [](const ort::CustomOp*) { return std::size_t{1}; };
  op.input_type = op.output_type = [](const ort::CustomOp*, std::size_t) { return ort::FLOAT; };
  op.input_characteristic = [](const ort::CustomOp*, std::size_t index) {
    return index < kOperator.inputs ? ort::REQUIRED : ort::OPTIONAL;
  };
  op.output_characteristic = [](const ort::CustomOp*, std::size_t) { return ort::REQUIRED; };
  op.input_memory_type = [](const ort::CustomOp*, std::size_t) { return ort::DEFAULT; };
  op.variadic_input_min_arity = op.variadic_output_min_arity =
      op.variadic_input_homogeneity = op.variadic_output_homogeneity =
          [](const ort::CustomOp*) { return 1; };
  op.create_kernel = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                        void** result) {
    return guard(api, [&] { *result = create_kernel(api, kOperator, info); });
  };
  op.compute = [](void* kernel, ort::KernelContext* context) {
    const Kernel& k = *static_cast<const Kernel*>(kernel);
    return guard(k.api, [&] { compute(k, context); });
  };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.infer_shape = [](const ort::CustomOp* self, ort::ShapeContext* context) {
    const ort::Api* const api = static_cast<const RegisteredOp*>(self)->api;
    return guard(api, [&] { infer_shape(api, kOperator, context); });
  };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 1; };
  return op;
}

}  // namespace

// Called by onnxruntime when the library is registered with the options of a session.
extern "C" INVOLUTION_EXPORT ort::Status* ORT_CALL RegisterCustomOps(ort::SessionOptions* options,
                                                                    const ort::ApiBase* base) {
  const ort::Api* const api = base->get_api(ort::VERSION);
  if (api == nullptr)
    return ort::create_status(base->get_api(1), ort::FAIL,
                              "involution: onnxruntime must be of version 1.17 or later");
  // Never released: sessions refer to them.
  struct Registration {
    RegisteredOp operators[2];
    ort::Domain* domain;
  };
  static std::mutex mutex;
  static auto* const registrations = new std::map<const ort::Api*, std::unique_ptr<Registration>>;
  return guard(api, [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Registration>& found = (*registrations)[api];
    if (found == nullptr) {
      std::unique_ptr<Registration> made(new Registration{
          {make_custom_op<UNFUSED>(api), make_custom_op<FUSED>(api)}, nullptr});
      check(ort::create_domain(api, "involution", &made->domain));
      for (const RegisteredOp& op : made->operators)
        check(ort::domain_add(api, made->domain, &op));
      found = std::move(made);
    }
    check(ort::add_domain(api, options, found->domain));
  });
}
