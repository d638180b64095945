// All steps of the CUDA pipeline except the network, for one device.
//
// A kernel is a body that processes index `i` of `n`, with its arguments in a struct of the same
// layout as its `ctypes.Structure` in kernels.py. The file also compiles as host C++, where the
// bodies run in a loop, so that tests on the host check the code that the device runs. Compiled
// without fused multiply-add, its sums equal those of the numpy pipeline bit for bit.
//
// Indices have 32 bits, as 64-bit division costs a GPU more than most bodies; offsets have 64 bits.
// Arrays are C-contiguous: images (C, X, Y, Z), logits (windows, K, x, y, z). The comment of each
// kernel names its numpy reference, and B, the minimum number of bytes moved per index.

#ifdef __CUDACC__

#define KERNEL(name, Args)                                                              \
    __device__ void name##_body(const Args &a, unsigned i);                             \
    extern "C" __global__ void name(unsigned n, const __grid_constant__ Args a) {       \
        unsigned i = blockIdx.x * blockDim.x + threadIdx.x;                             \
        if (i < n) name##_body(a, i);                                                   \
    }                                                                                   \
    __device__ void name##_body(const Args &a, unsigned i)
#define FUNCTION __device__ inline
#define EXP expf

// Relaxed atomic accesses, for memory that other threads of the kernel change.
FUNCTION int load(const int *p) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
FUNCTION void store(int *p, int value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
FUNCTION unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
FUNCTION float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

#else

#include <cmath>
#include <cstring>

#define KERNEL(name, Args)                                                              \
    static void name##_body(const Args &a, unsigned i);                                 \
    extern "C" void name(unsigned n, const Args *a) {                                   \
        for (unsigned i = 0; i < n; ++i) name##_body(*a, i);                            \
    }                                                                                   \
    static void name##_body(const Args &a, unsigned i)
#define FUNCTION static inline
#define EXP std::exp

FUNCTION int load(const int *p) { return *p; }
FUNCTION void store(int *p, int value) { *p = value; }
FUNCTION int atomicAdd(int *p, int value) { int old = *p; *p += value; return old; }
FUNCTION int atomicMin(int *p, int value) { int old = *p; if (value < old) *p = value; return old; }
FUNCTION int atomicMax(int *p, int value) { int old = *p; if (value > old) *p = value; return old; }

FUNCTION unsigned short half_bits(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
FUNCTION float half_value(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}

#endif

struct Extent { int x, y, z; };

FUNCTION Extent place(unsigned i, Extent of) {
    unsigned row = i / of.z;
    return Extent{(int)(row / of.y), (int)(row % of.y), (int)(i % of.z)};
}
FUNCTION long long index(Extent at, Extent of) {
    return ((long long)at.x * of.y + at.y) * of.z + at.z;
}
FUNCTION long long voxels_of(Extent shape) { return (long long)shape.x * shape.y * shape.z; }
FUNCTION bool inside(Extent at, Extent of) {
    return at.x >= 0 && at.y >= 0 && at.z >= 0 && at.x < of.x && at.y < of.y && at.z < of.z;
}
FUNCTION Extent plus(Extent a, Extent b) { return Extent{a.x + b.x, a.y + b.y, a.z + b.z}; }
FUNCTION Extent minus(Extent a, Extent b) { return Extent{a.x - b.x, a.y - b.y, a.z - b.z}; }
FUNCTION int axis(Extent s, int which) { return which == 0 ? s.x : which == 1 ? s.y : s.z; }

// Memory layout of a volume, with any order and direction of the axes.
struct Layout {
    long long offset, x, y, z;  // in elements
};
FUNCTION long long element(Layout s, Extent at) {
    return s.offset + at.x * s.x + at.y * s.y + at.z * s.z;
}

// A flip or quarter turn (geometry.py): axis j of the turned image is axis `axes[j]` of the image,
// reversed if `flips[j]` is set.
struct AxisTransform {
    int axes[3];
    int flips[3];
};
FUNCTION Extent turned_shape(AxisTransform t, Extent shape) {
    return Extent{axis(shape, t.axes[0]), axis(shape, t.axes[1]), axis(shape, t.axes[2])};
}
FUNCTION Extent from_turned(AxisTransform t, Extent at, Extent shape) {
    Extent turned = turned_shape(t, shape);
    int source[3] = {0, 0, 0};
    for (int j = 0; j < 3; ++j) {
        int value = t.flips[j] ? axis(turned, j) - 1 - axis(at, j) : axis(at, j);
        for (int k = 0; k < 3; ++k)  // a constant index keeps `source` in registers
            if (t.axes[j] == k) source[k] = value;
    }
    return Extent{source[0], source[1], source[2]};
}
FUNCTION Extent to_turned(AxisTransform t, Extent at, Extent shape) {
    Extent turned = turned_shape(t, shape);
    int target[3];
    for (int j = 0; j < 3; ++j) {
        int value = axis(at, t.axes[j]);
        target[j] = t.flips[j] ? axis(turned, j) - 1 - value : value;
    }
    return Extent{target[0], target[1], target[2]};
}

// A window plan (windows.py): along each axis `count` windows, `stride` apart, the last at `last`.
struct Tiling {
    Extent window, count, stride, last;
    Extent pad;  // padding in front of the turned image
};
FUNCTION int start_along(int which, int stride, int last) {
    int start = which * stride;
    return start < last ? start : last;
}
FUNCTION Extent start_of(const Tiling &t, int window) {
    Extent which = place(window, t.count);
    return Extent{start_along(which.x, t.stride.x, t.last.x), start_along(which.y, t.stride.y, t.last.y),
                 start_along(which.z, t.stride.z, t.last.z)};
}
// Index of the first window along an axis that may contain `at`.
FUNCTION int first_along(int at, int window, int stride) {
    return at < window ? 0 : (at - window) / stride + 1;
}
// Calls `visit(window, position in it)` for all windows that contain a voxel, in the plan's order.
template <class Visit> FUNCTION void for_windows_around(const Tiling &t, Extent at, Visit visit) {
    for (int x = first_along(at.x, t.window.x, t.stride.x); x < t.count.x; ++x) {
        int in_x = at.x - start_along(x, t.stride.x, t.last.x);
        if (in_x < 0) break;
        for (int y = first_along(at.y, t.window.y, t.stride.y); y < t.count.y; ++y) {
            int in_y = at.y - start_along(y, t.stride.y, t.last.y);
            if (in_y < 0) break;
            for (int z = first_along(at.z, t.window.z, t.stride.z); z < t.count.z; ++z) {
                int in_z = at.z - start_along(z, t.stride.z, t.last.z);
                if (in_z < 0) break;
                visit((x * t.count.y + y) * t.count.z + z, Extent{in_x, in_y, in_z});
            }
        }
    }
}

// Widens a box (smallest X, Y, Z, then largest). Most voxels only read it and change nothing.
FUNCTION void widen(int *box, Extent at) {
    for (int j = 0; j < 3; ++j) {
        if (axis(at, j) < load(box + j)) atomicMin(box + j, axis(at, j));
        if (axis(at, j) > load(box + 3 + j)) atomicMax(box + 3 + j, axis(at, j));
    }
}

// Counts of the nonzero values of one channel, and their bounding box; one index per voxel, in
// memory order. Reference: numpy.bincount, foreground.foreground_box. B: 2.
struct ScanArgs {
    const void *volume;  // int16, or fp32
    int *counts;         // 65536, indexed by value + 32768, or by the upper half of the key
    int *box;
    Extent shape;  // of the memory
    AxisTransform transform;    // from memory to the volume
};
KERNEL(scan, ScanArgs) {
    int value = ((const short *)a.volume)[i];
    if (value == 0) return;
    atomicAdd(a.counts + value + 32768, 1);
    widen(a.box, to_turned(a.transform, place(i, a.shape), a.shape));
}

// Order-preserving key of a float: for both signs, the larger float has the larger key.
FUNCTION unsigned key_of(float value) {
    union { float value; unsigned bits; } both;
    both.value = value;
    return both.bits >> 31 ? ~both.bits : both.bits | 0x80000000u;
}

// The same as `scan` for floats: counts of the upper halves of their keys. With the counts of some
// lower halves (`refine`) they yield any order statistic (radix selection: Alabi et al., "Fast
// k-selection algorithms for graphics processing units", JEA 17, 2012). B: 4.
KERNEL(scan_float, ScanArgs) {
    float value = ((const float *)a.volume)[i];
    if (value == 0) return;
    atomicAdd(a.counts + (key_of(value) >> 16), 1);
    widen(a.box, to_turned(a.transform, place(i, a.shape), a.shape));
}

// Counts of the lower halves of keys whose upper half was chosen. Reference: numpy.unique. B: 4.
struct RefineArgs {
    const float *volume;
    const int *chosen;  // 65536: row in `counts` of each chosen upper half, -1 for the others
    int *counts;        // rows of 65536
};
KERNEL(refine, RefineArgs) {
    float value = a.volume[i];
    if (value == 0) return;
    unsigned key = key_of(value);
    int which = a.chosen[key >> 16];
    if (which >= 0) atomicAdd(a.counts + which * 65536 + (key & 65535), 1);
}

// Partial sums over every `lanes`-th voxel: of the nonzero values, or of their squared deviations
// from the mean. The host adds them in a fixed order. Reference: numpy.sum. B: 4 per voxel.
struct MomentArgs {
    const float *volume;
    double *sums;  // one per index
    double mean;
    long long voxels;
    int lanes, squared;
};
KERNEL(moment, MomentArgs) {
    double sum = 0;
    for (long long j = i; j < a.voxels; j += a.lanes) {
        double value = a.volume[j];
        if (value == 0) continue;
        sum += a.squared ? (value - a.mean) * (value - a.mean) : value;
    }
    a.sums[i] = sum;
}

// Maps one channel of the box by a lookup table (z-score and histogram matching; normalise.py).
// Reference: normalise.normalise_channel. B: 6.
struct NormaliseArgs {
    const short *volume;
    const float *table;  // 65536, indexed by value + 32768
    float *image;        // (X, Y, Z) of the box
    Layout layout;
    Extent shape, origin;  // of the box
};
KERNEL(normalise, NormaliseArgs) {
    Extent source = plus(place(i, a.shape), a.origin);
    a.image[i] = a.table[a.volume[element(a.layout, source)] + 32768];
}

// The same for floats, by evaluating the piecewise linear curve. Reference: numpy.interp. B: 8.
struct NormaliseFloatArgs {
    const float *volume;
    const double *knots;  // `count` intensities, then their values
    float *image;
    Layout layout;
    Extent shape, origin;
    int count, keep_zero;
};
KERNEL(normalise_float, NormaliseFloatArgs) {
    double value = a.volume[element(a.layout, plus(place(i, a.shape), a.origin))];
    const double *x = a.knots, *y = a.knots + a.count;
    int last = a.count - 2, j = 0;
    while (j < last && value >= x[j + 1]) ++j;
    double slope = (y[j + 1] - y[j]) / (x[j + 1] - x[j]);
    bool beyond = value > x[last + 1];
    double mapped = slope * (value - x[beyond ? j + 1 : j]) + y[beyond ? j + 1 : j];
    a.image[i] = a.keep_zero && value == 0 ? 0.0f : (float)mapped;
}

// Flags the windows of the turned, padded image that are not all 0; the others skip the network.
// Reference: numpy.any per window. B: 4C.
struct OccupyArgs {
    const float *image;  // (C, X, Y, Z)
    int *occupied;       // per window
    Extent shape;         // of the image
    Tiling tiling;
    AxisTransform transform;
    int channels;
};
KERNEL(occupy, OccupyArgs) {
    long long voxels = voxels_of(a.shape);
    bool empty = true;
    for (int c = 0; c < a.channels && empty; ++c) empty = a.image[c * voxels + i] == 0;
    if (empty) return;
    Extent at = plus(to_turned(a.transform, place(i, a.shape), a.shape), a.tiling.pad);
    int *occupied = a.occupied;
    for_windows_around(a.tiling, at, [=](int window, Extent) {
        if (!load(occupied + window)) store(occupied + window, 1);
    });
}

// Copies windows of the turned, padded image to the engine's input. Reference: windows.pad_image
// and Box.slices. B: 4 + 2 or 4.
struct GatherArgs {
    const float *image;  // (C, X, Y, Z)
    void *batches;       // each (windows, C, x, y, z), fp16 or fp32
    const int *windows;  // index of each window of the batches in the plan
    long long stride;     // from one batch to the next, in elements
    Extent shape;         // of the image
    Tiling tiling;
    AxisTransform transform;
    int channels, batch, half;  // `batch` windows per batch
};
KERNEL(gather, GatherArgs) {
    unsigned voxels = (unsigned)voxels_of(a.tiling.window);
    unsigned channel = i / voxels, window = channel / a.channels;
    long long to = window / a.batch * a.stride +
                   (long long)(i - window / a.batch * a.batch * a.channels * voxels);
    Extent at = plus(place(i % voxels, a.tiling.window), start_of(a.tiling, a.windows[window]));
    Extent turned = minus(at, a.tiling.pad);
    float value = 0;
    if (inside(turned, turned_shape(a.transform, a.shape))) {
        Extent source = from_turned(a.transform, turned, a.shape);
        value = a.image[channel % a.channels * voxels_of(a.shape) + index(source, a.shape)];
    }
    if (a.half) ((unsigned short *)a.batches)[to] = half_bits(value);
    else ((float *)a.batches)[to] = value;
}

// Converts logits from fp32 to fp16, to halve their memory. Reference: numpy.astype. B: 6.
struct NarrowArgs {
    const float *logits;
    unsigned short *kept;
};
KERNEL(narrow, NarrowArgs) { a.kept[i] = half_bits(a.logits[i]); }

const int MOST_CLASSES = 32;
const float LEAST_WEIGHT = 1.17549435e-38f;  // the smallest normal number: uncovered voxels stay 0

template <int N> FUNCTION int first_largest(const float (&scores)[N], int count) {
    int best = 0;
    float largest = scores[0];
    for (int k = 1; k < N; ++k)
        if (k < count && scores[k] > largest) {
            best = k;
            largest = scores[k];
        }
    return best;
}

// One pass over all windows. For each voxel of the box: the mean of the logits of all windows that
// contain it, weighted by the importance map, and summed in the plan's order without atomics, hence
// deterministic. Then its class; with several passes, a vote plus 1/16 of the probability, or the
// probability alone (tta.py), is added to the scores, and the last pass writes the class.
// Reference: sliding_window.sliding_window, tta.Fusion.
// B: 2.4 K times 2 or 4, and 8K with several passes.
struct BlendArgs {
    const void *logits;       // (windows, K, x, y, z), fp16 or fp32
    const float *importance;  // (x, y, z)
    const long long *places;  // per window of the plan: element of its logits, -1 if it is all 0
    float *scores;            // (K, X, Y, Z), or null for a single pass
    unsigned char *classes;   // (X, Y, Z)
    int *not_finite;          // set to 1 if a blended logit is not finite
    Extent shape;              // of the box
    Tiling tiling;
    AxisTransform transform;
    int count, half, vote, first, last;  // `count` classes; first or last pass
};
template <int N> FUNCTION void blend_classes(const BlendArgs &a, unsigned i) {
    float sums[N], weight_sum = 0;
    for (int k = 0; k < N; ++k) sums[k] = 0;
    const long long *places = a.places;
    Extent at = plus(to_turned(a.transform, place(i, a.shape), a.shape), a.tiling.pad);
    long long voxels = voxels_of(a.tiling.window), box = voxels_of(a.shape);
    for_windows_around(a.tiling, at, [&](int window, Extent within) {
        if (places[window] < 0) return;
        long long inner = index(within, a.tiling.window);
        float weight = a.importance[inner];
        weight_sum += weight;
        for (int k = 0; k < N; ++k) {
            if (k >= a.count) break;
            long long from = places[window] + k * voxels + inner;
            float logit = a.half ? half_value(((const unsigned short *)a.logits)[from])
                                 : ((const float *)a.logits)[from];
            sums[k] += logit * weight;
        }
    });
    weight_sum = weight_sum > LEAST_WEIGHT ? weight_sum : LEAST_WEIGHT;
    for (int k = 0; k < N; ++k) {
        if (k >= a.count) break;
        sums[k] /= weight_sum;
        if (!(sums[k] - sums[k] == 0)) store(a.not_finite, 1);
    }
    int best = first_largest(sums, a.count);
    if (a.scores) {
        float largest = sums[0], sum = 0;
        for (int k = 1; k < N; ++k)
            if (k < a.count && sums[k] > largest) largest = sums[k];
        for (int k = 0; k < N; ++k)
            if (k < a.count) sum += sums[k] = EXP(sums[k] - largest);
        for (int k = 0; k < N; ++k) {
            if (k >= a.count) break;
            float score = sums[k] / sum;
            if (a.vote) score = score * 0.0625f + (k == best ? 1.0f : 0.0f);
            sums[k] = a.first ? score : a.scores[k * box + i] + score;
            if (!a.last) a.scores[k * box + i] = sums[k];
        }
        if (!a.last) return;
        best = first_largest(sums, a.count);
    }
    a.classes[i] = (unsigned char)best;
}
KERNEL(blend, BlendArgs) {  // so that the sums of few classes fit in registers
    if (a.count <= 4) blend_classes<4>(a, i);
    else if (a.count <= 8) blend_classes<8>(a, i);
    else blend_classes<MOST_CLASSES>(a, i);
}

// 26-connected components of one class, by union-find over voxels: the root of a tree is its
// smallest voxel index, whatever the order of the unions (Playne and Hawick, "A new algorithm for
// parallel connected-component labelling on GPUs", IEEE TPDS 29, 2018). Five kernels, in sequence.
struct LabelArgs {
    unsigned char *classes;  // (X, Y, Z), 0 is background
    int *parents;            // per voxel, -1 for background
    int *sizes;              // per voxel; the size of a component is at its root
    int *removed;            // number of removed components
    Extent shape;
    int min_voxels;
};
// Length of the run of equal values along Z that begins at `i`, 0 if `i` continues a run. Counting
// then takes one atomic addition per run instead of one per voxel.
template <class T> FUNCTION int run_along_z(const T *values, unsigned i, Extent shape) {
    int z = (int)(i % shape.z), length = 1;
    if (z > 0 && values[i - 1] == values[i]) return 0;
    while (z + length < shape.z && values[i + length] == values[i]) ++length;
    return length;
}
// Threads unite concurrently, without locks. Why the result is right: a parent is never larger than
// its child, and only `atomicMin` changes it, so each entry only decreases and paths end in a root.
// A stale entry is an earlier parent, hence an ancestor in the same tree or one that is united with
// it: following it takes longer, but leads to a member of the same component. `unite` ends when both
// roots are equal, or when its `atomicMin` has found `high` still a root. In every other case the
// entry of `high` held a smaller parent, `old`, that another thread had written: `low` and `old` both
// belong to the component, and the loop goes on with them. As every turn follows smaller indices,
// it ends.
FUNCTION int root_of(const int *parents, int i) {
    for (int parent = load(parents + i); parent != i; parent = load(parents + i)) i = parent;
    return i;
}
FUNCTION void unite(int *parents, int first, int second) {
    for (;;) {
        first = root_of(parents, first);
        second = root_of(parents, second);
        if (first == second) return;
        int low = first < second ? first : second, high = first < second ? second : first;
        int old = atomicMin(parents + high, low);
        if (old == high) return;  // it was still a root, and is now a child of `low`
        first = old;
        second = low;
    }
}
// Reference: scipy.ndimage.label, cleanup.remove_small_components.
KERNEL(label_start, LabelArgs) {  // B: 9
    a.parents[i] = a.classes[i] ? (int)i : -1;
    a.sizes[i] = 0;
}
KERNEL(label_merge, LabelArgs) {  // B: 5 and more
    if (!a.classes[i]) return;
    Extent at = place(i, a.shape);
    for (int n = 0; n < 13; ++n) {  // the neighbours of smaller index
        Extent other = {at.x + n / 9 - 1, at.y + n / 3 % 3 - 1, at.z + n % 3 - 1};
        if (!inside(other, a.shape)) continue;
        int j = (int)index(other, a.shape);
        if (a.classes[j] == a.classes[i]) unite(a.parents, (int)i, j);
    }
}
KERNEL(label_flatten, LabelArgs) {  // B: 4 and more
    if (load(a.parents + i) >= 0) store(a.parents + i, root_of(a.parents, (int)i));
}
KERNEL(label_count, LabelArgs) {  // B: 4 and more
    int root = a.parents[i];
    if (root < 0) return;
    int length = run_along_z(a.parents, i, a.shape);
    if (length) atomicAdd(a.sizes + root, length);
}
KERNEL(label_remove, LabelArgs) {  // B: 4 and more
    int root = a.parents[i];
    if (root < 0) return;
    if (a.sizes[root] >= a.min_voxels) return;
    a.classes[i] = 0;
    if (root == (int)i) atomicAdd(a.removed, 1);
}

// Writes the classes of the box as label values to the volume, which is 0 elsewhere.
// Reference: numpy indexing. B: 2.
struct RestoreArgs {
    const unsigned char *classes;  // (X, Y, Z) of the box
    unsigned char *labels;
    int *counts;  // voxels per class
    Layout layout;
    Extent shape, origin;  // of the box
    unsigned char values[MOST_CLASSES];
};
KERNEL(restore, RestoreArgs) {
    Extent target = plus(place(i, a.shape), a.origin);
    int found = a.classes[i];
    a.labels[element(a.layout, target)] = a.values[found];
    int length = found ? run_along_z(a.classes, i, a.shape) : 0;
    if (length) atomicAdd(a.counts + found, length);
}
