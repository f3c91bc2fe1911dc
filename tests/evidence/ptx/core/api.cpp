// The C interface that core.py loads with ctypes.
#include <algorithm>
#include <map>
#include <string_view>

#include "scheduler.h"

namespace ptx {

namespace {

std::vector<Entry>& registry() {
  static std::vector<Entry> entries;
  return entries;
}

// One instruction as Python encodes it.
struct Encoded {
  int64_t handler, flow, guard, negated, line, first_operand, mod[kMods];
};

struct FaultRecord {
  int32_t kind, warp, lane, pc, block[3];
  char text[1024];
};

}  // namespace

void add_handlers(const Entry* entries, size_t count) { registry().insert(registry().end(), entries, entries + count); }

extern "C" {

int64_t ptx_abi() { return (int64_t{sizeof(Encoded)} << 32) | (sizeof(FaultRecord) << 16) | kProfileFields; }

int64_t ptx_handler(const char* name) {
  const auto& all = registry();
  for (size_t i = 0; i < all.size(); ++i)
    if (std::string_view(all[i].name) == name) return static_cast<int64_t>(i);
  return -1;
}

int64_t ptx_handler_count() { return static_cast<int64_t>(registry().size()); }
const char* ptx_handler_name(int64_t index) { return registry()[index].name; }

void* ptx_program(const Encoded* code, int64_t count, const int32_t* operands, int64_t operand_count,
                  const int32_t* jumps, int64_t jump_count, const uint32_t* consts, int64_t const_words,
                  const SpecialRow* specials, int64_t special_count, int32_t rows, int32_t preds) {
  auto* p = new Program;
  p->operands.assign(operands, operands + operand_count);
  p->jumps.assign(jumps, jumps + jump_count);
  p->consts.assign(consts, consts + const_words);
  p->specials.assign(specials, specials + special_count);
  p->rows = rows;
  p->preds = preds;
  for (int64_t i = 0; i < count; ++i) {
    const Encoded& e = code[i];
    Instr in;
    in.run = registry()[e.handler].run;
    in.op = p->operands.data() + e.first_operand;
    std::copy(std::begin(e.mod), std::end(e.mod), std::begin(in.mod));
    in.guard = static_cast<int32_t>(e.guard);
    in.line = static_cast<int32_t>(e.line);
    in.negated = e.negated != 0;
    in.flow = static_cast<Flow>(e.flow);
    p->code.push_back(in);
  }
  return p;
}

void ptx_free(void* program) { delete static_cast<Program*>(program); }

// 0, or the kind of the fault that stopped the launch; the profile is filled up to there.
int32_t ptx_launch(const void* program, const LaunchSettings* settings, Profile* profile, FaultRecord* record) {
  Launch launch{static_cast<const Program*>(program), settings, {}, {}, {}, profile};
  for (size_t i = 0; i < launch.program->code.size(); ++i) profile[i] = Profile{};
  for (int i = 0; i < settings->buffer_count; ++i)
    launch.global.add(
        {settings->buffer_bases[i], settings->buffer_sizes[i], settings->buffer_hosts[i], settings->buffer_names[i]});
  Scheduler scheduler(launch);
  try {
    scheduler.run();
    return 0;
  } catch (const Fault& fault) {
    record->kind = static_cast<int32_t>(fault.kind);
    record->lane = fault.lane;
    record->warp = scheduler.warp;
    record->pc = scheduler.pc;
    std::copy(std::begin(scheduler.block), std::end(scheduler.block), std::begin(record->block));
    std::snprintf(record->text, sizeof record->text, "%s", fault.what());
    return record->kind;
  }
}

}  // extern "C"

}  // namespace ptx
