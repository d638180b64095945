// Every step of the sliding window but the network, for one CUDA device.
//
// A kernel is a body that does the work of one index `i` out of `n`, with its arguments in a struct
// of the same layout as its `ctypes.Structure` in kernels.py. The same file compiles as host C++,
// where the bodies run in a loop: so what the tests prove of it holds for the device but for timing.
// Compiled without fused multiply-add, its sums are those of the numpy executor to the bit.
//
// Arrays are C-contiguous, images (C, X, Y, Z), logits (windows, K, x, y, z). Each kernel's comment
// gives the bytes that it must move per index: B.

#ifdef __CUDACC__

#define KERNEL(name, Args)                                                              \
    __device__ void name##_body(const Args &a, long long i);                            \
    extern "C" __global__ void name(long long n, const Args a) {                        \
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;                 \
        if (i < n) name##_body(a, i);                                                   \
    }                                                                                   \
    __device__ void name##_body(const Args &a, long long i)
#define FUNCTION __device__ inline
#define EXP expf

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
    static void name##_body(const Args &a, long long i);                                \
    extern "C" void name(long long n, const Args *a) {                                  \
        for (long long i = 0; i < n; ++i) name##_body(*a, i);                           \
    }                                                                                   \
    static void name##_body(const Args &a, long long i)
#define FUNCTION static inline
#define EXP std::exp

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

struct Shape { int x, y, z; };

FUNCTION Shape place(long long i, Shape of) {
    Shape at;
    at.z = (int)(i % of.z);
    at.y = (int)(i / of.z % of.y);
    at.x = (int)(i / of.z / of.y);
    return at;
}
FUNCTION long long index(Shape at, Shape of) {
    return ((long long)at.x * of.y + at.y) * of.z + at.z;
}
FUNCTION bool inside(Shape at, Shape of) {
    return at.x >= 0 && at.y >= 0 && at.z >= 0 && at.x < of.x && at.y < of.y && at.z < of.z;
}
FUNCTION int axis(Shape s, int which) { return which == 0 ? s.x : which == 1 ? s.y : s.z; }

// A volume as it lies in the file: any order of axes, any direction.
struct Strided {
    long long offset, x, y, z;  // in elements
};
FUNCTION long long element(Strided s, Shape at) {
    return s.offset + at.x * s.x + at.y * s.y + at.z * s.z;
}

// A flip or quarter turn (tta.py): axis j of the turned image reads axis `axes[j]` of the image,
// backwards where `flips[j]` is set.
struct Turn {
    int axes[3];
    int flips[3];
};
FUNCTION Shape turned_shape(Turn t, Shape shape) {
    return Shape{axis(shape, t.axes[0]), axis(shape, t.axes[1]), axis(shape, t.axes[2])};
}
FUNCTION Shape from_turned(Turn t, Shape at, Shape shape) {
    Shape turned = turned_shape(t, shape);
    int source[3];
    for (int j = 0; j < 3; ++j)
        source[t.axes[j]] = t.flips[j] ? axis(turned, j) - 1 - axis(at, j) : axis(at, j);
    return Shape{source[0], source[1], source[2]};
}
FUNCTION Shape to_turned(Turn t, Shape at, Shape shape) {
    Shape turned = turned_shape(t, shape);
    int target[3];
    for (int j = 0; j < 3; ++j) {
        int value = axis(at, t.axes[j]);
        target[j] = t.flips[j] ? axis(turned, j) - 1 - value : value;
    }
    return Shape{target[0], target[1], target[2]};
}

// Counts of the values of one channel, and the box around those that are not 0. B: 2.
struct ScanArgs {
    const short *volume;
    int *counts;  // 65536, of value + 32768
    int *box;     // least X, Y, Z and largest X, Y, Z
    Strided layout;
    Shape shape;
};
KERNEL(scan, ScanArgs) {
    Shape at = place(i, a.shape);
    int value = a.volume[element(a.layout, at)];
    atomicAdd(a.counts + value + 32768, 1);
    if (value == 0) return;
    for (int j = 0; j < 3; ++j) {
        atomicMin(a.box + j, axis(at, j));
        atomicMax(a.box + 3 + j, axis(at, j));
    }
}

// One channel of the box, through a look-up table (z-score and histogram matching). B: 6.
struct NormaliseArgs {
    const short *volume;
    const float *table;  // 65536, of value + 32768
    float *image;        // (X, Y, Z) of the box
    Strided layout;
    Shape shape, origin;  // of the box
};
KERNEL(normalise, NormaliseArgs) {
    Shape at = place(i, a.shape);
    Shape source = {at.x + a.origin.x, at.y + a.origin.y, at.z + a.origin.z};
    a.image[i] = a.table[a.volume[element(a.layout, source)] + 32768];
}

// Which windows of the turned, padded image hold anything but 0; the others need no network. B: 4C.
struct OccupyArgs {
    const float *image;  // (C, X, Y, Z)
    int *occupied;       // per window
    const Shape *starts; // of the windows, in the turned, padded image
    Shape shape;         // of the image
    Shape pad;           // before the turned image
    Shape window;
    Turn turn;
    int channels, windows;
};
KERNEL(occupy, OccupyArgs) {
    long long voxels = (long long)a.shape.x * a.shape.y * a.shape.z;
    bool empty = true;
    for (int c = 0; c < a.channels && empty; ++c) empty = a.image[c * voxels + i] == 0;
    if (empty) return;
    Shape turned = to_turned(a.turn, place(i, a.shape), a.shape);
    for (int w = 0; w < a.windows; ++w) {
        Shape start = a.starts[w];
        Shape within = {turned.x + a.pad.x - start.x, turned.y + a.pad.y - start.y,
                        turned.z + a.pad.z - start.z};
        if (inside(within, a.window)) a.occupied[w] = 1;  // all write the same
    }
}

// Windows of the turned and padded image, as the engine takes them. B: 4 + 2 or 4.
struct GatherArgs {
    const float *image;  // (C, X, Y, Z)
    void *batch;         // (windows, C, x, y, z), fp16 or fp32
    const Shape *starts; // of the windows, in the turned, padded image
    Shape shape;         // of the image
    Shape pad;           // before the turned image
    Shape window;
    Turn turn;
    int channels, half;
};
KERNEL(gather, GatherArgs) {
    long long voxels = (long long)a.window.x * a.window.y * a.window.z;
    Shape at = place(i % voxels, a.window);
    int channel = (int)(i / voxels % a.channels);
    Shape start = a.starts[i / voxels / a.channels];
    Shape turned = {at.x + start.x - a.pad.x, at.y + start.y - a.pad.y, at.z + start.z - a.pad.z};
    float value = 0;
    if (inside(turned, turned_shape(a.turn, a.shape))) {
        long long image_voxels = (long long)a.shape.x * a.shape.y * a.shape.z;
        value = a.image[channel * image_voxels + index(from_turned(a.turn, turned, a.shape), a.shape)];
    }
    if (a.half) ((unsigned short *)a.batch)[i] = half_bits(value);
    else ((float *)a.batch)[i] = value;
}

// Adds windows to the blended logits, per voxel in the order of the windows: no floating-point
// atomics, so the same sum each time. B: K * (8 + 2 or 4 per covering window).
struct BlendArgs {
    const void *logits;  // (windows, K, x, y, z), fp16 or fp32
    const float *importance;  // (x, y, z)
    float *blended;      // (K, X, Y, Z) of the padded image
    float *weights;      // (X, Y, Z) of the padded image
    const Shape *starts;
    Shape padded, window;
    int windows, classes, half;
};
KERNEL(blend, BlendArgs) {
    Shape at = place(i, a.padded);
    long long padded_voxels = (long long)a.padded.x * a.padded.y * a.padded.z;
    long long voxels = (long long)a.window.x * a.window.y * a.window.z;
    float weight_sum = a.weights[i];
    for (int w = 0; w < a.windows; ++w) {
        Shape start = a.starts[w];
        Shape within = {at.x - start.x, at.y - start.y, at.z - start.z};
        if (!inside(within, a.window)) continue;
        long long place_in_window = index(within, a.window);
        float weight = a.importance[place_in_window];
        weight_sum += weight;
        for (int k = 0; k < a.classes; ++k) {
            long long from = ((long long)w * a.classes + k) * voxels + place_in_window;
            float logit = a.half ? half_value(((const unsigned short *)a.logits)[from])
                                 : ((const float *)a.logits)[from];
            a.blended[k * padded_voxels + i] += logit * weight;
        }
    }
    a.weights[i] = weight_sum;
}

FUNCTION int first_largest(const float *scores, int count) {
    int best = 0;
    for (int k = 1; k < count; ++k)
        if (scores[k] > scores[best]) best = k;
    return best;
}

const int MOST_CLASSES = 32;
const float LEAST_WEIGHT = 1.17549435e-38f;  // the smallest normal number: uncovered voxels stay 0

// Adds one pass to the scores of the box: a vote and 1/16 of the probability, or the probability
// alone (tta.py). With `classes` given, there is one pass only: the class itself is written. B: 8K.
struct FuseArgs {
    const float *blended;  // (K, X, Y, Z) of the turned, padded image
    const float *weights;  // (X, Y, Z) of the same
    float *scores;         // (K, X, Y, Z) of the image, or null
    unsigned char *classes;  // (X, Y, Z) of the image, or null
    Shape shape, padded, pad;
    Turn turn;
    int count, vote;
};
KERNEL(fuse, FuseArgs) {
    Shape turned = to_turned(a.turn, place(i, a.shape), a.shape);
    Shape at = {turned.x + a.pad.x, turned.y + a.pad.y, turned.z + a.pad.z};
    long long from = index(at, a.padded);
    long long padded_voxels = (long long)a.padded.x * a.padded.y * a.padded.z;
    long long voxels = (long long)a.shape.x * a.shape.y * a.shape.z;
    float weight = a.weights[from] > LEAST_WEIGHT ? a.weights[from] : LEAST_WEIGHT;
    float logits[MOST_CLASSES], sum = 0;
    for (int k = 0; k < a.count; ++k) logits[k] = a.blended[k * padded_voxels + from] / weight;
    int best = first_largest(logits, a.count);
    if (a.classes) {
        a.classes[i] = (unsigned char)best;
        return;
    }
    float largest = logits[best];
    for (int k = 0; k < a.count; ++k) {
        logits[k] = EXP(logits[k] - largest);
        sum += logits[k];
    }
    for (int k = 0; k < a.count; ++k) {
        float score = logits[k] / sum;
        if (a.vote) score = score * 0.0625f + (k == best ? 1.0f : 0.0f);
        a.scores[k * voxels + i] += score;
    }
}

// The class with the highest score, the first of equals. B: 4K + 1.
struct DecideArgs {
    const float *scores;
    unsigned char *classes;
    long long voxels;
    int count;
};
KERNEL(decide, DecideArgs) {
    float scores[MOST_CLASSES];
    for (int k = 0; k < a.count; ++k) scores[k] = a.scores[k * a.voxels + i];
    a.classes[i] = (unsigned char)first_largest(scores, a.count);
}

// Components of one class with 26 neighbours, by union-find over voxels: a tree's root is its
// smallest voxel, whatever the order of the unions (Playne and Hawick, "A new algorithm for parallel
// connected-component labelling on GPUs", IEEE TPDS 29, 2018). Four kernels, one after the other.
struct LabelArgs {
    unsigned char *classes;  // (X, Y, Z), 0 is background
    int *parents;            // per voxel, -1 for background
    int *sizes;              // per voxel, of the component at its root
    int *removed;            // components taken away
    Shape shape;
    int min_voxels;
};
FUNCTION int root_of(const int *parents, int i) {
    while (parents[i] != i) i = parents[i];
    return i;
}
FUNCTION void unite(int *parents, int first, int second) {
    for (;;) {
        first = root_of(parents, first);
        second = root_of(parents, second);
        if (first == second) return;
        int low = first < second ? first : second, high = first < second ? second : first;
        int old = atomicMin(parents + high, low);
        if (old == high) return;  // it was still a root, and now hangs below the other
        first = old;
        second = low;
    }
}
KERNEL(label_start, LabelArgs) {  // B: 9
    a.parents[i] = a.classes[i] ? (int)i : -1;
    a.sizes[i] = 0;
}
KERNEL(label_merge, LabelArgs) {  // B: 5 and more
    if (!a.classes[i]) return;
    Shape at = place(i, a.shape);
    for (int n = 0; n < 13; ++n) {  // the neighbours before it
        Shape other = {at.x + n / 9 - 1, at.y + n / 3 % 3 - 1, at.z + n % 3 - 1};
        if (!inside(other, a.shape)) continue;
        int j = (int)index(other, a.shape);
        if (a.classes[j] == a.classes[i]) unite(a.parents, (int)i, j);
    }
}
KERNEL(label_count, LabelArgs) {  // B: 8 and more
    if (a.parents[i] < 0) return;
    atomicAdd(a.sizes + root_of(a.parents, (int)i), 1);
}
KERNEL(label_remove, LabelArgs) {  // B: 9 and more
    if (a.parents[i] < 0) return;
    int root = root_of(a.parents, (int)i);
    if (a.sizes[root] >= a.min_voxels) return;
    a.classes[i] = 0;
    if (root == (int)i) atomicAdd(a.removed, 1);
}

// The box's classes as label values in the volume, which is 0 elsewhere. B: 2.
struct PasteArgs {
    const unsigned char *classes;  // (X, Y, Z) of the box
    unsigned char *labels;
    int *counts;  // voxels per class
    Strided layout;
    Shape shape, origin;  // of the box
    unsigned char values[MOST_CLASSES];
};
KERNEL(paste, PasteArgs) {
    Shape at = place(i, a.shape);
    Shape target = {at.x + a.origin.x, at.y + a.origin.y, at.z + a.origin.z};
    int found = a.classes[i];
    a.labels[element(a.layout, target)] = a.values[found];
    if (found) atomicAdd(a.counts + found, 1);
}
