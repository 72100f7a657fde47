// TensorFlow: a custom operation by TensorFlow's C interface, which unlike the C++ one stays the same
// from release to release. The few declarations used are written here, so that building needs no
// TensorFlow; loading finds them in the process.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "involution.h"

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
void TF_OpDefinitionBuilderSetShapeInferenceFunction(
    TF_OpDefinitionBuilder*, void (*)(TF_ShapeInferenceContext*, TF_Status*));
void TF_ShapeInferenceContextSetUnknownShape(TF_ShapeInferenceContext*, TF_Status*);
void TF_RegisterOpDefinition(TF_OpDefinitionBuilder*, TF_Status*);

TF_KernelBuilder* TF_NewKernelBuilder(const char*, const char*,
                                      void* (*)(TF_OpKernelConstruction*),
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

// With a namespace, so that TensorFlow refuses to save a model that only this library could run.
constexpr char NAME[] = "Involution>Native", FUSED[] = "Involution>NativeFused";

struct Status {
  TF_Status* of = TF_NewStatus();
  ~Status() { TF_DeleteStatus(of); }
  bool ok() const { return TF_GetCode(of) == TF_OK; }
};

struct Tensor {
  TF_Tensor* of = nullptr;
  ~Tensor() {
    if (of != nullptr) TF_DeleteTensor(of);
  }
};

void shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  // The numbers are known when the operation runs; Python tells the graph what is known earlier.
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

struct Kernel {
  std::int32_t threads = 1;
};

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  auto* kernel = new Kernel;
  TF_OpKernelConstruction_GetAttrInt32(construction, "threads", &kernel->threads, status.of);
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status.of);
  return kernel;
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// The result's shape: the batch of a, and the rest by the numbers. Returns the number of axes.
int result_shape(const std::int64_t* n, int rank, std::int64_t batch, std::int64_t* dims) {
  std::int64_t channels[2] = {n[4], 0};
  int count = 1;
  if (n[0] == 2) {
    channels[0] = n[12] * n[13] * n[14];
    channels[1] = n[5];
    count = 2;
  }
  const std::int64_t* sizes = (n[0] == 1 ? n + 6 : n + 9) + 3 - rank;
  int axis = 0;
  dims[axis++] = batch;
  if (n[2])
    for (int i = 0; i < count; ++i) dims[axis++] = channels[i];
  for (int i = 0; i < rank; ++i) dims[axis++] = sizes[i];
  if (!n[2])
    for (int i = 0; i < count; ++i) dims[axis++] = channels[i];
  return axis;
}

void compute(void* kernel, TF_OpKernelContext* context) {
  Status status;
  const auto fail = [&](TF_Code code, const char* message) {
    if (code != TF_OK) TF_SetStatus(status.of, code, message);
    TF_OpKernelContext_Failure(context, status.of);
  };
  Tensor a, b, numbers, result;
  TF_GetInput(context, 0, &a.of, status.of);
  if (status.ok()) TF_GetInput(context, 1, &b.of, status.of);
  if (status.ok()) TF_GetInput(context, 2, &numbers.of, status.of);
  if (!status.ok()) return fail(TF_OK, "");
  if (TF_NumDims(numbers.of) != 1 || TF_Dim(numbers.of, 0) != INVOLUTION_NUMBERS)
    return fail(TF_INVALID_ARGUMENT, "involution: numbers of another version");

  const auto* n = static_cast<const std::int64_t*>(TF_TensorData(numbers.of));
  const int rank = TF_NumDims(a.of) - (n[0] == 1 ? 3 : 2);
  if (rank < 1 || rank > 3) return fail(TF_INVALID_ARGUMENT, "involution: tensors of another rank");
  const TF_DataType type = TF_TensorType(a.of);
  const std::size_t bytes = type == TF_DOUBLE ? 8 : type == TF_FLOAT ? 4 : 2;
  std::int64_t dims[6];
  const int axes = result_shape(n, rank, TF_Dim(a.of, 0), dims);
  std::size_t size = bytes;
  for (int i = 0; i < axes; ++i) size *= static_cast<std::size_t>(dims[i]);
  result.of = TF_AllocateOutput(context, 0, type, dims, axes, size, status.of);
  if (!status.ok()) return fail(TF_OK, "");
  if (involution_run(n, dims[0], static_cast<Kernel*>(kernel)->threads, TF_TensorData(a.of),
                     TF_TensorData(b.of), TF_TensorData(result.of)))
    fail(TF_RESOURCE_EXHAUSTED, "involution: memory ran out");
}

// A fused member: four arguments, the numbers, two results, of which the second has a type of its
// own and, but for the kernel's gradient, no elements.
void compute_fused(void* kernel, TF_OpKernelContext* context) {
  Status status;
  const auto fail = [&](TF_Code code, const char* message) {
    if (code != TF_OK) TF_SetStatus(status.of, code, message);
    TF_OpKernelContext_Failure(context, status.of);
  };
  Tensor arguments[4], numbers, result, second;
  for (int i = 0; i < 4 && status.ok(); ++i) TF_GetInput(context, i, &arguments[i].of, status.of);
  if (status.ok()) TF_GetInput(context, 4, &numbers.of, status.of);
  if (!status.ok()) return fail(TF_OK, "");
  if (TF_NumDims(numbers.of) != 1 || TF_Dim(numbers.of, 0) != INVOLUTION_FUSED_NUMBERS)
    return fail(TF_INVALID_ARGUMENT, "involution: numbers of another version");

  const auto* n = static_cast<const std::int64_t*>(TF_TensorData(numbers.of));
  const TF_Tensor* const first = arguments[0].of;
  const int rank = TF_NumDims(first) - 2;
  if (rank < 1 || rank > 3) return fail(TF_INVALID_ARGUMENT, "involution: tensors of another rank");
  const bool gradient = n[0] == 2;
  const std::int64_t batch = TF_Dim(first, 0), hidden = n[INVOLUTION_NUMBERS];
  const std::int64_t* const sizes = (n[0] == 1 ? n + 6 : n + 9) + 3 - rank;
  std::int64_t dims[5] = {batch}, weights[3] = {0, hidden + 1, n[12] * n[13] * n[14] * n[5]};
  for (int i = 0; i < rank; ++i) dims[i + 1] = sizes[i];
  dims[rank + 1] = gradient ? hidden : n[4];
  if (gradient) weights[0] = batch;
  const auto allocate = [&](int index, TF_DataType type, const std::int64_t* of, int axes) {
    std::size_t size = type == TF_DOUBLE ? 8 : type == TF_FLOAT ? 4 : 2;
    for (int i = 0; i < axes; ++i) size *= static_cast<std::size_t>(of[i]);
    return TF_AllocateOutput(context, index, type, of, axes, size, status.of);
  };
  const TF_DataType type = TF_TensorType(first);
  result.of = allocate(0, type, dims, rank + 2);
  if (status.ok())
    second.of = allocate(1, type == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT, weights, gradient ? 3 : 1);
  if (!status.ok()) return fail(TF_OK, "");
  const void* data[4];
  for (int i = 0; i < 4; ++i) data[i] = TF_TensorData(arguments[i].of);
  if (involution_run_fused(n, batch, static_cast<Kernel*>(kernel)->threads, data[0], data[1],
                           data[2], data[3], TF_TensorData(result.of), TF_TensorData(second.of)))
    fail(TF_RESOURCE_EXHAUSTED, "involution: memory ran out");
}

bool register_operation(const char* name, std::initializer_list<const char*> inputs,
                        std::initializer_list<const char*> outputs, const char* more,
                        void (*compute)(void*, TF_OpKernelContext*)) {
  Status status;
  TF_OpDefinitionBuilder* operation = TF_NewOpDefinitionBuilder(name);
  TF_OpDefinitionBuilderAddAttr(operation, "T: {double, float, bfloat16, half}");
  if (more != nullptr) TF_OpDefinitionBuilderAddAttr(operation, more);
  TF_OpDefinitionBuilderAddAttr(operation, "threads: int");
  // For the gradient, which is chosen when a graph is made: the numbers are known when it runs.
  TF_OpDefinitionBuilderAddAttr(operation, "member: int");
  for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(operation, input);
  for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(operation, output);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(operation, &shape);
  TF_RegisterOpDefinition(operation, status.of);
  if (status.ok())
    TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", &create, compute, &destroy),
                             status.of);
  if (!status.ok()) std::fprintf(stderr, "involution: %s\n", TF_Message(status.of));
  return status.ok();
}

const bool registered =
    register_operation(NAME, {"a: T", "b: T", "numbers: int64"}, {"result: T"}, nullptr, &compute) &&
    register_operation(FUSED, {"a: T", "b: T", "c: T", "d: T", "numbers: int64"},
                       {"result: T", "second: W"}, "W: {double, float}", &compute_fused);

}  // namespace
