-- Adds to the budgets of a day what an instance has seen of them and Redis has lost.
--
-- Each instance has seen a part of the lost changes only. The first one that notices a loss describes it: what the
-- budgets held then, and the highest lost value of each that was added by now. The others add what they have seen beyond
-- that, once for each loss. After it the changes are counted from far above all before, so that values that were seen
-- before and after the loss are told apart by their number.
--
-- A change that was made after the loss, and before it was described, is a part of what the budgets held then.
--
-- KEYS    1 the budgets; 2 description of their last loss; 3 name of a value of another program that is moved aside
-- ARGV    1 life of the budgets in s; 2 highest number of a change that was seen; 3 name for a loss that is noticed now;
--         4 name of the last loss that this instance has handled, or ''; 5 life of the description in s; 6 by how much
--         the number of changes is raised; 7 lowest number of a change after the loss that was seen here, or ''; 8 '1' if
--         another server answers, so that changes may be lost that only others have seen;
--         then four for each budget: slot, number of the change after which it was seen, value, and what changes after
--         the loss have added here
-- result  number of commands; 1 if values were lost, else 0; name of the last loss, or ''; present number of changes; then
--         the present value of each budget in ARGV
local raw, described = redis.call('GET', KEYS[1]) or '', redis.pcall('GET', KEYS[2])

-- Returns a number of the stored budgets; 0 beyond their end.
local function number_at(stored, index)
  local bytes = {string.byte(stored, index * 8 + 1, index * 8 + 8)}
  if #bytes < 8 then return 0 end
  local value = bytes[1] >= 128 and bytes[1] - 256 or bytes[1]
  for i = 2, 8 do value = value * 256 + bytes[i] end
  return value
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
local has_later = name and first_after and first_after <= at
if has_later and is_first then base_count = math.min(base_count, first_after - 1) end
for slot, number, value in string.gmatch(listed or '', ' (%d+):(%d+):(%-?%d+)') do
  bases[tonumber(slot)] = {tonumber(number), tonumber(value)}
end

local values = {}
for i = 9, #ARGV, 4 do
  local slot, number, value, later = tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local added = 0
  if has_later and later ~= 0 then
    local base = bases[slot] or {0, number_at(raw_then, slot + 1)}
    bases[slot], is_changed = base, true
    if base[1] == 0 then base[2] = base[2] - later else added = later end
  end
  if is_first then
    local base = bases[slot] or {0, number_at(raw_then, slot + 1)}
    if number > math.max(base[1], base_count) and number < raised_to then
      if value > base[2] then added, base[2] = added + value - base[2], value end
      base[1], bases[slot], is_changed = number, base, true
    end
  end
  if added ~= 0 then
    adds[#adds + 1], is_lost = {slot + 1, added}, true
  end
  values[#values + 1] = string.format('%.0f', number_at(raw, slot + 1) + added)
end

if #adds > 0 then
  local writes = {'BITFIELD', KEYS[1]}
  for _, add in ipairs(adds) do
    for _, part in ipairs({'INCRBY', 'i64', '#' .. add[1], string.format('%.0f', add[2])}) do writes[#writes + 1] = part end
  end
  redis.call(unpack(writes))
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  commands = commands + 2
end
if is_changed then
  local text = string.format('%s %.0f %.0f %.0f', name, at, base_count, raised_to)
  for slot, base in pairs(bases) do text = text .. string.format(' %.0f:%.0f:%.0f', slot, base[1], base[2]) end
  redis.call('SET', KEYS[2], text .. '\n' .. raw_then, 'EX', ARGV[5])
  commands = commands + 1
end
local present = string.format('%.0f', is_new and raised_to or count)
return {commands, is_lost and 1 or 0, name or '', present, unpack(values)}
