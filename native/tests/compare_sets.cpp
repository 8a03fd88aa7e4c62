// Every instruction set that runs here against the plain kernels, for machines without Python: `compare_sets SETS LAYERS` ends with status 1 when results differ.
//
// SETS, separated by commas, are the sets that must run; another list is an error. LAYERS is a file of whole layers and the outputs they must have, written by
// tests/test_emulated.py from the golden vectors, so that the plain kernels are compared with something, too.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>

#include "sets_cases.h"

namespace {

int failures = 0;

void fail(const std::string& set, const std::string& what) {
    std::fprintf(stderr, "%s: %s\n", set.c_str(), what.c_str());
    failures++;
}

std::string running_sets() {
    std::string names;
    for (int i = 0; const char* name = septet_instruction_set_name(i); i++)
        if (*septet_instruction_set_obstacle(i) == 0) names += (names.empty() ? "" : ",") + std::string(name);
    return names;
}

// A set that cannot run here is refused by name, and so is one that nobody knows.
void check_refusals() {
    for (int i = 0; const char* name = septet_instruction_set_name(i); i++) {
        const int wanted = *septet_instruction_set_obstacle(i) == 0 ? SEPTET_OK : SEPTET_ERROR_CPU_UNSUPPORTED;
        if (septet_set_instruction_set(name) != wanted) fail(name, "can run or is refused, as its obstacle says");
    }
    if (septet_set_instruction_set("neon-9000") != SEPTET_ERROR_CPU_UNKNOWN) fail("neon-9000", "must be unknown");
}

void compare(const std::string& set, const Results& wanted, const Results& found) {
    for (size_t i = 0; i < wanted.exact.size(); i++)
        if (wanted.exact[i].bytes != found.exact[i].bytes) fail(set, wanted.exact[i].name + " must equal the plain kernels bit for bit");
    for (size_t i = 0; i < wanted.near.size(); i++) {
        const Near &a = wanted.near[i], &b = found.near[i];
        for (size_t j = 0; j < a.values.size(); j++)
            if (!(std::fabs(static_cast<double>(a.values[j]) - b.values[j]) <= a.bound)) {
                fail(set, a.name + " must stay within its bound of the plain kernels");
                break;
            }
    }
}

// A layer of the file: 9 numbers, then arrays of bytes, each behind its size; absent ones have size 0.
struct StoredLayer {
    int64_t numbers[9] = {};
    std::vector<char> weight, scale, offset, input_scale, x, y;

    bool read(std::istream& in) {
        if (!in.read(reinterpret_cast<char*>(numbers), sizeof numbers)) return false;
        for (std::vector<char>* array : {&weight, &scale, &offset, &input_scale, &x, &y}) {
            int64_t size = 0;
            in.read(reinterpret_cast<char*>(&size), sizeof size);
            array->resize(static_cast<size_t>(size));
            in.read(array->data(), size);
        }
        return static_cast<bool>(in);
    }
    static const float* floats(const std::vector<char>& array) { return array.empty() ? nullptr : reinterpret_cast<const float*>(array.data()); }

    void check(const std::string& set, int index) const {
        const int64_t* n = numbers;
        const septet_layer layer = {static_cast<int>(n[0]), static_cast<int>(n[1]), n[2], n[3], weight.data(), floats(scale), floats(offset), floats(input_scale),
                                    n[4], n[5], n[6], n[7], nullptr};
        std::vector<char> found(y.size(), 1);
        const int error = septet_linear(&layer, floats(x), n[8], SEPTET_ACTIVATIONS_INT8, reinterpret_cast<float*>(found.data()), 1);
        if (error != SEPTET_OK || found != y) fail(set, "layer " + std::to_string(index) + " of the file must have the outputs that stand there");
    }
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return std::fprintf(stderr, "usage: compare_sets SETS LAYERS\n"), 2;
    if (running_sets() != arguments[1]) return std::fprintf(stderr, "must run: %s, but here run: %s\n", arguments[1], running_sets().c_str()), 2;
    std::vector<StoredLayer> layers(1);
    std::ifstream file(arguments[2], std::ios::binary);
    while (layers.back().read(file)) layers.emplace_back();
    layers.pop_back();
    if (layers.empty()) return std::fprintf(stderr, "no layers in %s\n", arguments[2]), 2;
    check_refusals();
    std::unique_ptr<Results> wanted;
    for (int i = 0; const char* name = septet_instruction_set_name(i); i++) {
        if (*septet_instruction_set_obstacle(i) != 0) continue;
        require(septet_set_instruction_set(name));
        auto found = std::make_unique<Results>(run_cases());
        for (size_t j = 0; j < layers.size(); j++) layers[j].check(name, static_cast<int>(j));
        if (wanted == nullptr) wanted = std::move(found);
        else compare(name, *wanted, *found);
    }
    std::printf("%zu exact results, %zu bounded ones and %zu layers on %s: %d failures\n", wanted->exact.size(), wanted->near.size(), layers.size(), arguments[1], failures);
    return failures == 0 ? 0 : 1;
}
