-- Adds to the budgets of a day what an instance has seen of them and Redis has lost.
--
-- Each instance has seen a part of the lost changes only. The first one that notices a loss describes it, and each one
-- adds to the description what it has seen, once for each loss: the values of the highest numbers of changes, and what
-- its own changes between the loss and the description have added, which the budgets hold by then. So the order of the
-- instances does not matter. After a loss the changes are counted from far above all before, so that values that were
-- seen before and after it are told apart by their number.
--
-- A reply may be lost, and its try repeated: the description names the tries of which it has such changes.
--
-- KEYS    1 the budgets; 2 description of their last loss; 3 name of a value of another program that is moved aside
-- ARGV    1 life of the budgets in s; 2 highest number of a change that was seen; 3 name for a loss that is noticed now;
--         4 name of the last loss that this instance has handled, or ''; 5 life of the description in s; 6 by how much
--         the number of changes is raised; 7 lowest number of a change after the loss that was seen here, or ''; 8 '1' if
--         another server answers, so that changes may be lost that only others have seen; 9 name of this try;
--         then four for each budget: slot, number of the change after which it was seen, value, and what changes after
--         the loss have added here
-- result  number of commands; 1 if values were lost, else 0; name of the last loss, or ''; present number of changes; the
--         present value of each budget in ARGV
local raw, described = redis.call('GET', KEYS[1]) or '', redis.pcall('GET', KEYS[2])

-- Returns a number of the stored budgets; 0 beyond their end.
local function number_at(stored, index)
  local a, b, c, d, e, f, g, h = string.byte(stored, index * 8 + 1, index * 8 + 8)
  if not h then return 0 end
  if a >= 128 then a = a - 256 end
  return ((((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f) * 256 + g) * 256 + h
end

-- Returns whether a stored value is none of ours: all our numbers have 53 bits.
local function is_foreign(stored)
  for index = 0, #stored / 8 - 1 do
    if math.abs(number_at(stored, index)) > 2 ^ 53 then return true end
  end
  return #stored % 8 > 0 or number_at(stored, 0) < 0
end

if is_foreign(raw) then
  redis.call('RENAME', KEYS[1], KEYS[3])
  redis.call('EXPIRE', KEYS[3], 604800)
  raw = ''
end
local seen, count, first_after = tonumber(ARGV[2]), number_at(raw, 0), tonumber(ARGV[7])
local name, at, base_count, raised_to, listed, raw_then
if type(described) == 'string' then
  name, at, base_count, raised_to, listed, raw_then = string.match(described, '^(%x+) (%d+) (%d+) (%d+)([^\n]*)\n(.*)$')
end
local is_lost = count < seen
local is_new = (is_lost or ARGV[8] == '1') and (not name or name == ARGV[4] or count < tonumber(raised_to))
local is_first = is_new or (name and name ~= ARGV[4])
local commands, is_changed, bases, adds = 2, is_new, {}, {}
if is_new then
  name, at, base_count, raised_to, listed, raw_then = ARGV[3], count, count, math.max(seen, count) + tonumber(ARGV[6]), '', raw
  adds[#adds + 1] = {0, raised_to - count}
end
at, base_count, raised_to = tonumber(at), tonumber(base_count), tonumber(raised_to)
local tries = {}
for try in string.gmatch(listed or '', ' (=%x+)') do tries[#tries + 1] = try end
for slot, number, value, later in string.gmatch(listed or '', ' (%d+):(%d+):(%-?%d+):?(%-?%d*)') do
  bases[tonumber(slot)] = {number = tonumber(number), value = tonumber(value), later = tonumber(later) or 0}
end

-- Returns what a budget held when the loss was described, with all that is known to be lost.
local function total(slot)
  local base, held = bases[slot], number_at(raw_then or '', slot + 1)
  if not base or base.number <= base_count then return held end
  return math.max(base.value, held - base.later) + base.later
end

local before, values = {}, {}
for slot in pairs(bases) do before[slot] = total(slot) end
local has_later = name and first_after and first_after <= at
if has_later then base_count = math.min(base_count, first_after - 1) end
local adds_later = has_later and not string.find(listed .. ' ', ' =' .. ARGV[9] .. ' ', 1, true)
if adds_later then tries[#tries + 1], is_changed = '=' .. ARGV[9], true end
is_lost = is_lost or (has_later and not adds_later)
for i = 10, #ARGV, 4 do
  local slot, number, value, later = tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local base = bases[slot] or {number = 0, value = 0, later = 0}
  before[slot] = before[slot] or total(slot)
  if is_first and number > base.number and number < raised_to then
    base.number, base.value, bases[slot], is_changed = number, value, base, true
  end
  if adds_later and later ~= 0 then base.later, bases[slot] = base.later + later, base end
end
for slot, held in pairs(before) do
  local added = total(slot) - held
  if added ~= 0 then adds[#adds + 1], is_lost = {slot + 1, added}, true end
  before[slot] = added
end
for i = 10, #ARGV, 4 do
  local slot = tonumber(ARGV[i])
  values[#values + 1] = string.format('%.0f', number_at(raw, slot + 1) + before[slot])
end

-- Lua passes at most 8000 values to one call.
for first = 1, #adds, 1000 do
  local writes = {'BITFIELD', KEYS[1]}
  for i = first, math.min(first + 999, #adds) do
    for _, part in ipairs({'INCRBY', 'i64', '#' .. adds[i][1], string.format('%.0f', adds[i][2])}) do
      writes[#writes + 1] = part
    end
  end
  redis.call(unpack(writes))
  commands = commands + 1
end
if #adds > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  commands = commands + 1
end
if is_changed then
  local parts = {string.format('%s %.0f %.0f %.0f', name, at, base_count, raised_to), unpack(tries)}
  for slot, base in pairs(bases) do
    parts[#parts + 1] = string.format('%.0f:%.0f:%.0f:%.0f', slot, base.number, base.value, base.later)
  end
  redis.call('SET', KEYS[2], table.concat(parts, ' ') .. '\n' .. raw_then, 'EX', ARGV[5])
  commands = commands + 1
end
local present = string.format('%.0f', is_new and raised_to or count)
return {commands, is_lost and 1 or 0, name or '', present, values}
