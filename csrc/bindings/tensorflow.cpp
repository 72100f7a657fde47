// TensorFlow: custom ops through its C API, which unlike the C++ API is stable across releases. The
// declarations in use are repeated here, so that the build needs no TensorFlow; the loader resolves
// the symbols in the process.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "params.h"

extern "C" {

struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
enum TF_Code { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };
enum TF_DataType { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19 };

TF_Status* TF_NewStatus();
void TF_DeleteStatus(TF_Status*);
void TF_SetStatus(TF_Status*, TF_Code, const char*);
TF_Code TF_GetCode(const TF_Status*);
const char* TF_Message(const TF_Status*);

TF_OpDefinitionBuilder* TF_NewOpDefinitionBuilder(const char*);
void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder*,
                                                     void (*)(TF_ShapeInferenceContext*,
                                                              TF_Status*));
void TF_ShapeInferenceContextSetUnknownShape(TF_ShapeInferenceContext*, TF_Status*);
void TF_RegisterOpDefinition(TF_OpDefinitionBuilder*, TF_Status*);

TF_KernelBuilder* TF_NewKernelBuilder(const char*, const char*, void* (*)(TF_OpKernelConstruction*),
                                      void (*)(void*, TF_OpKernelContext*), void (*)(void*));
void TF_RegisterKernelBuilder(const char*, TF_KernelBuilder*, TF_Status*);
void TF_OpKernelConstruction_GetAttrInt32(TF_OpKernelConstruction*, const char*, std::int32_t*,
                                          TF_Status*);
void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction*, TF_Status*);
void TF_GetInput(TF_OpKernelContext*, int, TF_Tensor**, TF_Status*);
TF_Tensor* TF_AllocateOutput(TF_OpKernelContext*, int, TF_DataType, const std::int64_t*, int,
                             std::size_t, TF_Status*);
void TF_OpKernelContext_Failure(TF_OpKernelContext*, TF_Status*);
TF_DataType TF_TensorType(const TF_Tensor*);
int TF_NumDims(const TF_Tensor*);
std::int64_t TF_Dim(const TF_Tensor*, int);
void* TF_TensorData(const TF_Tensor*);
void TF_DeleteTensor(TF_Tensor*);
}

namespace {

// With a namespace: TensorFlow then refuses to save a model that only this library can run.
constexpr char NAME[] = "Involution>Native", FUSED[] = "Involution>NativeFused";

struct Status {
  TF_Status* handle = TF_NewStatus();
  ~Status() { TF_DeleteStatus(handle); }
  bool ok() const { return TF_GetCode(handle) == TF_OK; }
};

struct Tensor {
  TF_Tensor* handle = nullptr;
  ~Tensor() {
    if (handle != nullptr) TF_DeleteTensor(handle);
  }
};

void shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  // The parameters are a tensor, known only when the op runs; Python sets the static shape.
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

struct OpState {
  std::int32_t threads = 1;
};

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  auto* state = new OpState;
  TF_OpKernelConstruction_GetAttrInt32(construction, "threads", &state->threads, status.handle);
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status.handle);
  return state;
}

void destroy(void* state) { delete static_cast<OpState*>(state); }

// As the enumeration in ops/native/params.py.
constexpr std::int64_t INPUT_GRAD = 1, KERNEL_GRAD = 2;

std::int64_t num_taps(const InvolutionParams& p) {
  return p.kernel_size[0] * p.kernel_size[1] * p.kernel_size[2];
}

// The last `rank` spatial sizes of the result.
const std::int64_t* spatial_size(const InvolutionParams& p, int rank) {
  return (p.pass == INPUT_GRAD ? p.input_size : p.output_size) + 3 - rank;
}

// Writes the shape of the result to `dims` and returns the number of axes.
int result_shape(const InvolutionParams& p, int rank, std::int64_t batch, std::int64_t* dims) {
  std::int64_t channels[2] = {p.channels, 0};
  int count = 1;
  if (p.pass == KERNEL_GRAD) {
    channels[0] = num_taps(p);
    channels[1] = p.groups;
    count = 2;
  }
  const std::int64_t* const size = spatial_size(p, rank);
  int axis = 0;
  dims[axis++] = batch;
  if (p.channels_first)
    for (int i = 0; i < count; ++i) dims[axis++] = channels[i];
  for (int i = 0; i < rank; ++i) dims[axis++] = size[i];
  if (!p.channels_first)
    for (int i = 0; i < count; ++i) dims[axis++] = channels[i];
  return axis;
}

std::size_t item_size(TF_DataType type) { return type == TF_DOUBLE ? 8 : type == TF_FLOAT ? 4 : 2; }

// The parameters in a tensor, or null if it has another size.
const InvolutionParams* read_params(const TF_Tensor* tensor) {
  if (TF_NumDims(tensor) != 1 || TF_Dim(tensor, 0) != INVOLUTION_PARAMS_SIZE) return nullptr;
  return static_cast<const InvolutionParams*>(TF_TensorData(tensor));
}

void compute(void* state, TF_OpKernelContext* context) {
  Status status;
  const auto fail = [&](TF_Code code, const char* message) {
    if (code != TF_OK) TF_SetStatus(status.handle, code, message);
    TF_OpKernelContext_Failure(context, status.handle);
  };
  Tensor a, b, params_tensor, result;
  TF_GetInput(context, 0, &a.handle, status.handle);
  if (status.ok()) TF_GetInput(context, 1, &b.handle, status.handle);
  if (status.ok()) TF_GetInput(context, 2, &params_tensor.handle, status.handle);
  if (!status.ok()) return fail(TF_OK, "");
  const InvolutionParams* const params = read_params(params_tensor.handle);
  if (params == nullptr)
    return fail(TF_INVALID_ARGUMENT, "involution: parameters of another version");

  const int rank = TF_NumDims(a.handle) - (params->pass == INPUT_GRAD ? 3 : 2);
  if (rank < 1 || rank > 3)
    return fail(TF_INVALID_ARGUMENT, "involution: the rank must be 1, 2 or 3");
  const TF_DataType type = TF_TensorType(a.handle);
  std::int64_t dims[6];
  const int axes = result_shape(*params, rank, TF_Dim(a.handle, 0), dims);
  std::size_t bytes = item_size(type);
  for (int i = 0; i < axes; ++i) bytes *= static_cast<std::size_t>(dims[i]);
  result.handle = TF_AllocateOutput(context, 0, type, dims, axes, bytes, status.handle);
  if (!status.ok()) return fail(TF_OK, "");
  if (involution_execute(params, dims[0], static_cast<OpState*>(state)->threads,
                         TF_TensorData(a.handle), TF_TensorData(b.handle),
                         TF_TensorData(result.handle)))
    fail(TF_RESOURCE_EXHAUSTED, "involution: out of memory");
}

// A fused pass: four arguments, the parameters, two results. The second result has its own type,
// and no elements except in the kernel gradient.
void compute_fused(void* state, TF_OpKernelContext* context) {
  Status status;
  const auto fail = [&](TF_Code code, const char* message) {
    if (code != TF_OK) TF_SetStatus(status.handle, code, message);
    TF_OpKernelContext_Failure(context, status.handle);
  };
  Tensor arguments[4], params_tensor, result, dweights;
  for (int i = 0; i < 4 && status.ok(); ++i)
    TF_GetInput(context, i, &arguments[i].handle, status.handle);
  if (status.ok()) TF_GetInput(context, 4, &params_tensor.handle, status.handle);
  if (!status.ok()) return fail(TF_OK, "");
  const InvolutionParams* const params = read_params(params_tensor.handle);
  if (params == nullptr)
    return fail(TF_INVALID_ARGUMENT, "involution: parameters of another version");

  const TF_Tensor* const first = arguments[0].handle;
  const int rank = TF_NumDims(first) - 2;
  if (rank < 1 || rank > 3)
    return fail(TF_INVALID_ARGUMENT, "involution: the rank must be 1, 2 or 3");
  const bool is_kernel_grad = params->pass == KERNEL_GRAD;
  const std::int64_t batch = TF_Dim(first, 0), hidden_channels = params->hidden_channels;
  std::int64_t dims[5] = {batch};
  for (int i = 0; i < rank; ++i) dims[i + 1] = spatial_size(*params, rank)[i];
  dims[rank + 1] = is_kernel_grad ? hidden_channels : params->channels;
  const std::int64_t dweights_dims[3] = {is_kernel_grad ? batch : 0, hidden_channels + 1,
                                         num_taps(*params) * params->groups};
  const auto allocate = [&](int index, TF_DataType type, const std::int64_t* shape, int axes) {
    std::size_t bytes = item_size(type);
    for (int i = 0; i < axes; ++i) bytes *= static_cast<std::size_t>(shape[i]);
    return TF_AllocateOutput(context, index, type, shape, axes, bytes, status.handle);
  };
  const TF_DataType type = TF_TensorType(first);
  result.handle = allocate(0, type, dims, rank + 2);
  if (status.ok())
    dweights.handle = allocate(1, type == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT, dweights_dims,
                               is_kernel_grad ? 3 : 1);
  if (!status.ok()) return fail(TF_OK, "");
  const void* data[4];
  for (int i = 0; i < 4; ++i) data[i] = TF_TensorData(arguments[i].handle);
  if (involution_execute_fused(params, batch, static_cast<OpState*>(state)->threads, data[0],
                               data[1], data[2], data[3], TF_TensorData(result.handle),
                               TF_TensorData(dweights.handle)))
    fail(TF_RESOURCE_EXHAUSTED, "involution: out of memory");
}

bool register_op(const char* name, std::initializer_list<const char*> inputs,
                 std::initializer_list<const char*> outputs, const char* attribute,
                 void (*compute)(void*, TF_OpKernelContext*)) {
  Status status;
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(name);
  TF_OpDefinitionBuilderAddAttr(op, "T: {double, float, bfloat16, half}");
  if (attribute != nullptr) TF_OpDefinitionBuilderAddAttr(op, attribute);
  TF_OpDefinitionBuilderAddAttr(op, "threads: int");
  // For the gradient function, which runs when a graph is built and cannot read the parameters.
  TF_OpDefinitionBuilderAddAttr(op, "pass_index: int");
  for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(op, input);
  for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(op, output);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, &shape);
  TF_RegisterOpDefinition(op, status.handle);
  if (status.ok())
    TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", &create, compute, &destroy),
                             status.handle);
  if (!status.ok()) std::fprintf(stderr, "involution: %s\n", TF_Message(status.handle));
  return status.ok();
}

const bool registered =
    register_op(NAME, {"a: T", "b: T", "params: int64"}, {"result: T"}, nullptr, &compute) &&
    register_op(FUSED, {"a: T", "b: T", "c: T", "d: T", "params: int64"},
                {"result: T", "dweights: W"}, "W: {double, float}", &compute_fused);

}  // namespace
