// A decoded PTX program: a dense array of instructions over a register file of 32-lane rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kFull = ~Mask{0};

struct Exec;
struct Instr;
using Handler = void (*)(Exec&, const Instr&, Mask);

// What the scheduler does with an instruction besides running its handler.
enum class Flow : int32_t {
  kNext = 0,
  kBranch = 1,    // mod[0]: target
  kIndirect = 2,  // op[0]: index row, mod[0]: start in the jump table, mod[1]: entries
  kExit = 3,
  kBarrier = 4,  // see BarrierForm
  kAligned = 5,  // every live lane of the warp must be here
  kMembers = 6,  // every lane of the member mask (row op[mod[5]]) must be here
};

constexpr int kMods = 6;

struct Instr {
  Handler run = nullptr;
  const int32_t* op = nullptr;  // rows (>= 0 registers, < 0 constants) or predicate slots
  int64_t mod[kMods] = {};      // modifiers, by family
  int32_t guard = -1;           // predicate slot
  int32_t line = 0;             // of the PTX text
  bool negated = false;
  Flow flow = Flow::kNext;
};

// Predicates are one 32-bit mask each; the first slots are fixed.
constexpr int kPredTrue = 0;
constexpr int kPredFalse = 1;
constexpr int kPredSink = 2;

// Operands and modifiers of a barrier instruction.
struct BarrierForm {
  enum Op { kId = 0, kCount = 1, kResult = 2, kSource = 3 };
  enum Mod { kKind = 0, kAligned = 1, kCounted = 2, kReduction = 3, kNegated = 4 };
  enum Kind { kSync = 0, kArrive = 1, kReduce = 2 };
  enum Reduction { kPopc = 0, kAnd = 1, kOr = 2 };
};

struct SpecialRow {
  int32_t kind, row;
};

struct Program {
  std::vector<Instr> code;
  std::vector<int32_t> operands;
  std::vector<int32_t> jumps;
  std::vector<uint32_t> consts;  // rows of 32 words
  std::vector<SpecialRow> specials;
  int32_t rows = 0, preds = 0;
  int32_t carry_row = -1;
};

// Kinds mirror errors.py.
enum class FaultKind : int32_t {
  kOutOfBounds = 1,
  kMisaligned = 2,
  kRace = 3,
  kAsyncRace = 4,
  kUninitialised = 5,
  kDivergentBarrier = 6,
  kInactiveLane = 7,
  kDeadlock = 8,
  kTrap = 9,
  kLimit = 10,
  kInvalid = 11,
};

struct Fault : std::runtime_error {
  FaultKind kind;
  int lane;
  Fault(FaultKind k, int l, const std::string& text) : std::runtime_error(text), kind(k), lane(l) {}
};

// Handlers register themselves by name; the Python side decodes to these names.
struct Entry {
  const char* name;
  Handler run;
};
void add_handlers(const Entry* entries, size_t count);
struct Registrar {
  template <size_t N>
  explicit Registrar(const Entry (&entries)[N]) {
    add_handlers(entries, N);
  }
};

}  // namespace ptx
